"""Sequences that begin alike in one row: every one is there once, and is read as if alone."""

from __future__ import annotations

import random

import pytest
import torch

from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone
from nla_ray.score.packing import PackedRow, pack, share_beginnings
from nla_ray.settings.config import BaseConfig


def test_sequences_that_begin_alike_share_a_row_and_every_sequence_is_there_once() -> None:
    assert share_beginnings([[7, 8, 9, 1], [7, 8, 1]]) == [PackedRow(0, ((1, 2),), 5)]
    first, second = [1, 2, 3, 4, 5, 6, 7, 8, 50], [1, 2, 3, 60, 61, 62, 63, 64, 65, 50]
    # the third, a short one, stands between two families
    ends = [[*first[:6], 50], [*first[:3], 50], [*second[:7], 50]]
    both = share_beginnings([first, *ends[:2], second, ends[2]])
    assert both == [PackedRow(3, ((4, 7), (2, 3)), 12), PackedRow(0, ((1, 6),), 10)]
    alike = share_beginnings([[*range(50), 50 + number, *range(50)] for number in range(30)])
    # of a template no row is made to whose length every row would be padded
    assert max(row.length for row in alike) <= 2 * 101
    draw = random.Random(0)
    sequences = [[draw.randrange(3) for _ in range(draw.randrange(1, 12))] for _ in range(200)]
    rows = share_beginnings(sequences)
    assert sorted(
        [row.whole for row in rows] + [number for row in rows for number, _ in row.ends]
    ) == list(range(200))
    for row in rows:
        assert row.length == len(sequences[row.whole]) + sum(
            len(sequences[number]) - shared for number, shared in row.ends
        )
        assert all(
            sequences[number][:shared] == sequences[row.whole][:shared]
            and 2 * shared >= len(sequences[number])
            for number, shared in row.ends
        )
    assert sum(row.length for row in rows) < sum(map(len, sequences))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_are_read_as_if_alone(tiny_base: BaseConfig, attention: str) -> None:
    draw = torch.Generator().manual_seed(3)
    long = torch.randint(40, 300, (24,), generator=draw).tolist()
    sequences = [
        long,
        [*long[:9], 41, 42],
        [*long[:17], 43, 41, 42],
        [50, 51, 52],
        [*long[:20], 41],
    ]
    model = load_backbone(tiny_base, attention=attention)
    rows = share_beginnings(sequences)
    assert [len(row.ends) for row in sorted(rows, key=lambda row: row.length)] == [0, 3]
    inputs, last = pack(sequences, rows, 0, model.dtype)
    reader = ResidualReader(model, [1])
    with torch.no_grad():
        stream = reader.read(**inputs)[1]
        for number, sequence in enumerate(sequences):
            torch.testing.assert_close(
                stream[last[number]],
                reader.read(torch.tensor([sequence]))[1][0, -1],
                rtol=1e-4,
                atol=1e-4,
            )
