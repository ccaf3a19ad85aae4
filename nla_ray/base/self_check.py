"""Whether a base, as it was loaded here, is read as it should be: a few tokens, at every load.

The parts of a base are taken from a table and its arithmetic from another library, whose next
version may compute otherwise. What is read from parts is held against what the library's whole
forward gives. Knows nothing of generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.base.families import blocks_of, causal_model, decoder_of
from nla_ray.base.layers import ResidualReader

_TOKENS = 8
_LEAST_LIKE = {torch.float32: 0.99999, torch.bfloat16: 0.999}
"""Cosines from which two streams are the same, whatever order sums were taken in."""


def sample_ids(model: nn.Module) -> Tensor:
    """A few ids from all over the vocabulary: [1, seq]."""
    config = causal_model(model).config
    ids = torch.linspace(1, config.vocab_size - 1, _TOKENS).long()
    return ids[None].to(model.device)


@torch.no_grad()
def check_reading(model: Any, layers: Sequence[int]) -> None:
    """Raise ValueError unless layers are read as the library's forward computes them.

    `model`: a frozen causal model, whole or its first blocks, with the adapter that is active. The
    last block is compared with what a hook sees before the final norm: `hidden_states` holds it
    normed.
    """
    ids, blocks = sample_ids(model), blocks_of(model)
    last: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(
        lambda block, inputs, output: last.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    try:
        outputs = decoder_of(model)(input_ids=ids, output_hidden_states=True, use_cache=False)
    finally:
        hook.remove()
    streams = ResidualReader(model, layers).read(ids)
    for layer in layers:
        is_last = layer == len(blocks) - 1
        expected = last[0] if is_last else outputs.hidden_states[layer + 1]
        _require_alike(f"stream after block {layer}", streams[layer], expected, model)


def _require_alike(what: str, found: Tensor, expected: Tensor, model: Any) -> None:
    like = torch.cosine_similarity(found.float(), expected.float(), dim=-1).min().item()
    least = _LEAST_LIKE.get(model.dtype, min(_LEAST_LIKE.values()))
    if not like >= least:  # nor a NaN
        raise ValueError(
            mismatch(
                model,
                f"a {what} of norm {_norm(found)} and cosine {like:.5f}",
                f"norm {_norm(expected)} and a cosine of at least {least}",
            )
        )


def _norm(stream: Tensor) -> str:
    return f"{stream.float().norm(dim=-1).mean().item():.4g}"


def mismatch(model: Any, got: str, expected: str) -> str:
    """The message of a self-check that failed."""
    config = causal_model(model).config
    return (
        f"self-check of base {config.name_or_path or config.model_type!r}: got {got}, expected"
        f" {expected}, as transformers {version('transformers')} computes it. Its model type"
        f" {config.model_type!r} is not computed there as it was when this was written: install the"
        " version of transformers that the README's command installs."
    )
