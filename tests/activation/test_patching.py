"""Patch-back equals the whole model run with a hook that overwrites the stream, row by row."""

from __future__ import annotations

import pytest
import torch

from nla_ray.activation.patching import Drifted, Patcher, at_norm_of
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone
from nla_ray.settings.config import BaseConfig

IDS = [5, 40, 8, 2, 77, 13, 9]
LAYERS = (0, 1, 2)
"""Of the tiny base's three blocks; nothing but the final norm stands above the last."""


@pytest.fixture(scope="module")
def model(tiny_base: BaseConfig):
    return load_backbone(tiny_base)


def overwritten(model, layer: int, ids: list[int], vector: torch.Tensor) -> torch.Tensor:
    """Log-probs of the next token when the stream after a block is overwritten at the end."""

    def overwrite(block, inputs, output):
        stream = (output[0] if isinstance(output, tuple) else output).clone()
        stream[:, -1] = vector
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = model.model.layers[layer].register_forward_hook(overwrite)
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("length", [1, 2, len(IDS)])
def test_divergence_is_that_of_the_whole_model_with_an_overwritten_stream(
    model, layer: int, length: int
) -> None:
    ids = IDS[:length]
    activation = ResidualReader(model, [layer]).read(torch.tensor([ids]))[layer][0, -1]
    generator = torch.Generator().manual_seed(layer)
    others = at_norm_of(torch.randn(3, len(activation), generator=generator), activation)
    torch.testing.assert_close(others.norm(dim=1), activation.norm().expand(3))
    found = Patcher(model, layer).patch(ids, activation, torch.cat([activation[None], others]))
    with torch.no_grad():
        clean = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    patched = [overwritten(model, layer, ids, vector) for vector in others]
    expected = [
        torch.nn.functional.kl_div(other, clean, log_target=True, reduction="sum")
        for other in patched
    ]
    torch.testing.assert_close(found.divergence[0], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.divergence[1:], torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert found.keeps_top.tolist() == [
        True,
        *(other.argmax() == clean.argmax() for other in patched),
    ]
    assert found.divergence[1:].min() > 1e-3


def test_an_activation_of_another_prompt_is_refused(model) -> None:
    activation = ResidualReader(model, [1]).read(torch.tensor([IDS]))[1][0, -1]
    with pytest.raises(Drifted, match=r"patch-back: got a residual stream that differs by"):
        Patcher(model, 1).patch([*IDS, 3], activation, activation[None])
    with pytest.raises(ValueError, match=r"base\.layer: got 3"):
        Patcher(model, 3)
