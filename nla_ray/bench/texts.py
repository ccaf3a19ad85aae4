"""What is timed on: test texts of the run's corpus, and activations of some of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from nla_ray.activation.capture import ActivationReader
from nla_ray.activation.positions import EncodedText, Skipped, TextEncoder
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.run.artifact import Run
from nla_ray.settings.config import RunConfig
from nla_ray.text.stage import read_chunks

NUM_ROWS = 64
"""Activations described at once."""


def test_texts(run: Run) -> list[str]:
    """Texts of the test split, in the corpus's order. Raises ValueError for fewer than NUM_ROWS."""
    chunks = read_chunks(run, ("split", "text")).to_pylist()
    texts = [chunk["text"] for chunk in chunks if chunk["split"] == "test"]
    if len(texts) < NUM_ROWS:
        raise ValueError(
            f"benchmark: got {len(texts)} test texts, expected at least {NUM_ROWS}. Use a larger"
            " corpus (--corpus.max-chunks) in another --run-dir."
        )
    return texts


def encode_shuffled(config: RunConfig, texts: Sequence[str], seed: int) -> Iterator[EncodedText]:
    """Texts in random order as token ids, last position; texts that do not fit are left out."""
    capture = dataclasses.replace(config.capture, positions="last", text_mean=False)
    encoder = TextEncoder(load_tokenizer(config.base), config.base, capture)
    for number, text in enumerate(random.Random(seed).sample(list(texts), len(texts))):
        try:
            yield encoder.encode(str(number), text)
        except Skipped:
            continue


def read_activations(config: RunConfig, texts: Sequence[str]) -> Tensor:
    """Activations [NUM_ROWS, d_model] of texts in random order."""
    base = config.base
    encoded = list(islice(encode_shuffled(config, texts, seed=1), NUM_ROWS))
    model = load_backbone(base, num_blocks=base.layer + 1)
    reader = ActivationReader(model, [base.layer], config.capture.batch_tokens)
    return torch.cat([torch.from_numpy(array) for array in reader.read(encoded)[base.layer]])
