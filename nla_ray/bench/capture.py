"""Capture: the stage's reader against the whole model with `output_hidden_states`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.activation.capture import ActivationReader, wanted_layers
from nla_ray.activation.positions import EncodedText
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.bench.models import read_parameters
from nla_ray.bench.texts import encode_shuffled
from nla_ray.bench.timing import REPETITIONS, side_by_side, timed_ratio
from nla_ray.settings.config import RunConfig

CAPTURE_FLOP = 4e11
"""Work of one repetition: decides how many texts are read."""
MIN_TEXTS, MAX_TEXTS = 16, 1_024
LIBRARY_BATCH = 32
"""Texts in a batch of the reference: the order they come in, padded to the longest."""


def benchmark_capture(
    config: RunConfig, texts: Sequence[str], repetitions: int = REPETITIONS
) -> dict[str, Any]:
    """Activations of the same texts in random order, by the reader and by the library.

    Tokens are those of the texts, padding not counted. Raises RuntimeError when the two disagree on
    an activation.
    """
    base, layers = config.base, wanted_layers(config.base, config.capture)
    whole = load_backbone(base)
    encoded = _enough_texts(config, texts, sum(weight.numel() for weight in whole.parameters()))
    cut = load_backbone(base, num_blocks=layers[-1] + 1)
    reader = ActivationReader(cut, layers, config.capture.batch_tokens)
    ours = partial(_read_ours, reader, encoded, base.layer)
    library = partial(_read_library, whole, load_tokenizer(base), encoded, base.layer)
    # The library's last hidden state is after the final norm: it is another vector.
    is_comparable = base.layer + 1 < whole.config.num_hidden_layers
    error = _relative_error(ours(), library()) if is_comparable else None
    if error is not None and error > (1e-4 if base.dtype == "float32" else 5e-2):
        raise RuntimeError(
            f"capture benchmark: got activations that differ by {error:.1e} of their size, expected"
            " the same vectors."
        )
    tokens = sum(len(text.ids) for text in encoded)
    return {
        **timed_ratio(*side_by_side(ours, library, repetitions), tokens),
        "tokens": tokens,
        "texts": len(encoded),
        "layer": base.layer,
        "largest_relative_difference": error,
        "flop": 2 * tokens * read_parameters(cut),
    }


def _enough_texts(config: RunConfig, texts: Sequence[str], parameters: int) -> list[EncodedText]:
    """Texts in random order until their tokens mean CAPTURE_FLOP of work."""
    encoded, tokens = [], 0
    for text in encode_shuffled(config, texts, seed=0):
        encoded.append(text)
        tokens += len(text.ids)
        is_enough = len(encoded) >= MIN_TEXTS and 2 * parameters * tokens > CAPTURE_FLOP
        if is_enough or len(encoded) >= MAX_TEXTS:
            break
    return encoded


def _read_ours(reader: ActivationReader, encoded: Sequence[EncodedText], layer: int) -> Tensor:
    return torch.cat([torch.from_numpy(array) for array in reader.read(encoded)[layer]])


@torch.inference_mode()
def _read_library(
    model: nn.Module, tokenizer, encoded: Sequence[EncodedText], layer: int
) -> Tensor:
    found = []
    for start in range(0, len(encoded), LIBRARY_BATCH):
        ids = [text.ids for text in encoded[start : start + LIBRARY_BATCH]]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        states = model(**batch, output_hidden_states=True).hidden_states[layer + 1]
        last = batch["attention_mask"].sum(-1) - 1
        found.append(states[torch.arange(len(states)), last].float().cpu())
    return torch.cat(found)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())
