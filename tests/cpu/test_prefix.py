"""The shared prefix is an exact rewriting of the forward: same logits, same gradients, and plain
where it does not apply."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from nla_ray.base.adapters import add_lora
from nla_ray.base.families import blocks_of, causal_model
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone
from nla_ray.cpu.shared_prefix import PackedRow, decode_sharing_prefix, pack, share_beginnings
from nla_ray.settings.config import BaseConfig, LoraSettings
from nla_ray.training.verbalizer import TrainableVerbalizer

PREFIX = (5, 9, 11, 7, 30, 31)


def build(base: BaseConfig, attention: str | None = None) -> TrainableVerbalizer:
    """The tiny base with an adapter that changes it, whose prompts begin with PREFIX."""
    wrap = partial(TrainableVerbalizer, prefix_ids=PREFIX)
    lora = LoraSettings(rank=4, alpha=8)
    model = add_lora(load_backbone(base, attention=attention), lora, wrap=wrap)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(
                    0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    return model


def batch(rows: int = 3) -> dict[str, Tensor]:
    """Rows that begin with the prefix and end in one, two, ... tokens of padding."""
    ids = torch.randint(40, 300, (rows, 15), generator=torch.Generator().manual_seed(0))
    ids[:, : len(PREFIX)] = torch.tensor(PREFIX)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 15 - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def read(model: TrainableVerbalizer, inputs: dict[str, Tensor], *, shared: bool) -> Tensor:
    """The decoder's output [batch, seq, d_model]."""
    return decode_sharing_prefix(causal_model(model).model, PREFIX if shared else (), **inputs)


def computed_tokens(
    model: TrainableVerbalizer, inputs: dict[str, Tensor], *, shared: bool = True
) -> list[tuple[int, int]]:
    """Shapes of what goes through the first block in one forward."""
    shapes: list[tuple[int, int]] = []
    hook = blocks_of(model)[0].register_forward_pre_hook(
        lambda module, arguments: shapes.append(tuple(arguments[0].shape[:2]))
    )
    read(model, inputs, shared=shared)
    hook.remove()
    return shapes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_are_those_of_the_plain_forward(
    tiny_base: BaseConfig, attention: str
) -> None:
    inputs, results = batch(), []
    for shared in (False, True):
        model = build(tiny_base, attention)
        logits = causal_model(model).lm_head(read(model, inputs, shared=shared))
        (logits.log_softmax(-1)[..., 7] * inputs["attention_mask"]).sum().backward()
        results.append(
            (
                logits.detach(),
                {
                    name: parameter.grad
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                },
            )
        )
    (plain, plain_gradients), (shared, shared_gradients) = results
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(shared[real], plain[real], atol=1e-5, rtol=1e-5)
    assert shared_gradients.keys() == plain_gradients.keys() and len(plain_gradients) == 3 * 7 * 2
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-4, rtol=1e-4)


def test_the_prefix_is_computed_once_and_only_the_rest_for_every_row(tiny_base: BaseConfig) -> None:
    model = build(tiny_base)
    assert computed_tokens(model, batch()) == [(1, 6), (3, 9)]
    assert computed_tokens(model, batch(), shared=False) == [(3, 15)]


def test_other_batches_are_computed_as_before(tiny_base: BaseConfig) -> None:
    model = build(tiny_base)
    other = batch()
    other["input_ids"][1, 2] = 200
    left_padded = batch()
    left_padded["attention_mask"][0, 0] = 0
    single = {name: tensor[:1] for name, tensor in batch().items()}
    short = {name: tensor[:, :4] for name, tensor in batch().items()}
    for inputs in (other, left_padded, single, short):
        assert computed_tokens(model, inputs) == [tuple(inputs["input_ids"].shape)]
    causal_model(model).gradient_checkpointing_enable()
    model.train()
    assert computed_tokens(model, batch())[0] == (3, 15)


def test_generation_and_logits_to_keep_work_on_a_model_that_shares(tiny_base: BaseConfig) -> None:
    inputs = batch(2)
    inputs["attention_mask"][:] = 1
    shared = build(tiny_base)
    plain = causal_model(shared)
    torch.testing.assert_close(
        shared(**inputs, use_cache=False, logits_to_keep=4).logits,
        plain(**inputs, use_cache=False, logits_to_keep=4).logits,
        atol=1e-5,
        rtol=1e-5,
    )
    assert torch.equal(
        shared.generate(**inputs, max_new_tokens=5, do_sample=False),
        plain.generate(**inputs, max_new_tokens=5, do_sample=False),
    )


# Sequences that begin alike in one row ------------------------------------------------------------


def test_sequences_that_begin_alike_share_a_row_and_every_sequence_is_there_once() -> None:
    assert share_beginnings([[7, 8, 9, 1], [7, 8, 1]]) == [PackedRow(0, ((1, 2),), 5)]
    first, second = [1, 2, 3, 4, 5, 6, 7, 8, 50], [1, 2, 3, 60, 61, 62, 63, 64, 65, 50]
    both = share_beginnings(
        [first, first[:6] + [50], first[:3] + [50], second, second[:7] + [50]]
    )  # a short one stands between two families
    assert both == [PackedRow(3, ((4, 7), (2, 3)), 12), PackedRow(0, ((1, 6),), 10)]
    alike = share_beginnings([[*range(50), 50 + number, *range(50)] for number in range(30)])
    assert (
        max(row.length for row in alike) <= 2 * 101
    )  # of a template no row is made that all others are padded to
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
    model = build(tiny_base, attention)
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
