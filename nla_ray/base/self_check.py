"""Whether a base, as it was loaded here, is read as it should be: a few tokens.

Capture, inspection and serving ask when they load one; an engine is asked when it is made.

The parts of a base are taken from a table and its arithmetic from another library, whose next
version may compute otherwise. What is read from parts is held against what the library's whole
forward gives. Knows nothing of generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from nla_ray.base.families import blocks_of, causal_model, decoder_of
from nla_ray.base.layers import ResidualReader, keep_output

_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}
"""Of a token's stream, as a share of it: more than the order of sums changes."""


def _sample_ids(model: Any) -> Tensor:
    """A few ids from all over the vocabulary: [1, seq]."""
    vocab_size = causal_model(model).config.vocab_size
    return torch.linspace(1, vocab_size - 1, _TOKENS, device=model.device).long()[None]


@torch.no_grad()
def check_reading(model: Any, layers: Sequence[int]) -> None:
    """Raise ValueError unless layers are read as the library's forward computes them.

    `model`: a frozen causal model, whole or its first blocks, with the adapter that is active. The
    last block is compared with what a hook sees before the final norm: `hidden_states` holds it
    normed.
    """
    ids, blocks = _sample_ids(model), blocks_of(model)
    last: dict[int, Tensor] = {}
    hook = blocks[-1].register_forward_hook(partial(keep_output, last, 0))
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
    """Token by token: some activations are a hundred times as large as the others."""
    found, expected = found.float(), expected.float()
    size, error = (x.square().sum(-1).sqrt() for x in (expected, found - expected))
    share = (error / size).amax().item()
    if not share <= _TOLERANCE.get(model.dtype, max(_TOLERANCE.values())):  # nor a NaN
        raise ValueError(
            mismatch(
                model,
                f"a {what} of which {share:.2g} is off at a token",
                "it whole",
                "Read it on another device or in another type",
            )
        )


def mismatch(model: Any, got: str, expected: str, first: str) -> str:
    """The message of a self-check that failed; `first`: what to try before another version."""
    config = causal_model(model).config
    return (
        f"self-check of base {config.name_or_path or config.model_type!r} ({config.model_type},"
        f" {model.dtype}): got {got}, expected {expected}, as transformers"
        f" {version('transformers')} computes it. {first}; where that fails too, install the"
        " version of transformers that the README's command installs."
    )
