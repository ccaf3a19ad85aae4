"""Sequences that begin alike, read in one row.

A description is scored after each of its lines, and cut short by the report: `pack` puts the
longest of such sequences into one row with the ends of the others. Each sees its own beginning and
nothing else, so that what comes out is what the plain forward would give. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """One sequence whole, and what others add to a beginning of it.

    The row 7 8 9 1 1 of the sequences number 0 and 1:

    >>> share_beginnings([[7, 8, 9, 1], [7, 8, 1]])
    [PackedRow(whole=0, ends=((1, 2),), length=5)]
    """

    whole: int
    """The number of the sequence."""
    ends: tuple[tuple[int, int], ...]
    """(number of a sequence, how many tokens of the whole one it begins with)."""
    length: int
    """In tokens."""


_LONGEST_ROW = 2
"""A row's most tokens, in lengths of its longest sequence: rows of one batch are padded to the
longest of them."""


def share_beginnings(sequences: Sequence[Sequence[int]]) -> list[PackedRow]:
    """Rows that hold every sequence once.

    A sequence joins a row when it shares at least half of itself with the row's longest, and the
    row has room.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(sequences)), key=lambda number: tuple(sequences[number])):
        before = sequences[groups[-1][-1]] if groups else ()
        shared = _common(before, sequences[number])
        if shared and 2 * shared >= min(len(before), len(sequences[number])):
            groups[-1].append(number)
        else:
            groups.append([number])
    return [row for group in groups for row in _rows_of(sequences, group)]


def _rows_of(sequences: Sequence[Sequence[int]], group: Sequence[int]) -> list[PackedRow]:
    """The longest with what shares half of itself with it, then the longest of what is left.

    And so on, until nothing is left.
    """
    rows: list[PackedRow] = []
    left = sorted(group, key=lambda number: len(sequences[number]), reverse=True)
    while left:
        whole, rest, ends = left[0], [], []
        length, longest = len(sequences[whole]), _LONGEST_ROW * len(sequences[whole])
        for number in left[1:]:
            size = len(sequences[number])
            shared = min(_common(sequences[whole], sequences[number]), size - 1)
            if 2 * shared >= size and length + size - shared <= longest:
                ends.append((number, shared))
                length += size - shared
            else:
                rest.append(number)
        rows.append(PackedRow(whole, tuple(ends), length))
        left = rest
    return rows


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    pairs = zip(first, second, strict=False)  # the shorter ends the comparison
    return next(
        (count for count, (left, right) in enumerate(pairs) if left != right),
        min(len(first), len(second)),
    )


def pack(
    sequences: Sequence[Sequence[int]], rows: Sequence[PackedRow], pad_id: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[int, tuple[int, int]]]:
    """A batch of rows as a decoder takes it, and (row, column) of each sequence's last token.

    `input_ids`, `position_ids` [rows, length] and `attention_mask` [rows, 1, length, length], which
    is added to attention's weights in type `dtype`: 0 where a token sees another one.
    """
    length = max(row.length for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    # padding sees itself: nothing at all gives NaN
    seen = torch.eye(length, dtype=torch.bool).expand(len(rows), 1, -1, -1).clone()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    last: dict[int, tuple[int, int]] = {}
    for index, row in enumerate(rows):
        start = 0
        for number, shared in ((row.whole, 0), *row.ends):
            added = torch.tensor(sequences[number][shared:])
            end = start + len(added)
            ids[index, start:end] = added
            positions[index, start:end] = torch.arange(shared, shared + len(added))
            seen[index, 0, start:end, :shared] = True
            seen[index, 0, start:end, start:end] = causal[: len(added), : len(added)]
            last[number], start = (index, end - 1), end
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": hidden}, last
