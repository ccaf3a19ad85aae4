"""The shared prefix is an exact rewriting of the forward: same logits, same gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nla_ray.base.adapters import add_lora
from nla_ray.base.families import blocks_of, causal_model
from nla_ray.base.load import load_backbone
from nla_ray.cpu.shared_prefix import decode_sharing_prefix
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
    otherwise = batch()
    otherwise["input_ids"][1, 2] = 200
    left_padded = batch()
    left_padded["attention_mask"][0, 0] = 0
    single = {name: tensor[:1] for name, tensor in batch().items()}
    short = {name: tensor[:, :4] for name, tensor in batch().items()}
    for inputs in (otherwise, left_padded, single, short):
        assert computed_tokens(model, inputs) == [tuple(inputs["input_ids"].shape)]
    causal_model(model).activation_checkpointing_enable()
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
