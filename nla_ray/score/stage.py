"""What a base model is like before anything is trained on it: which marker, which layer, which
injection norm.

texts, labels -> activations of several layers in one pass -> for each layer its norms and the gold
ceiling: how well a ridge regression from features of labels to activations tells validation
activations apart. Minutes, no adapter, nothing of test.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_ray.activation.capture import ActivationReader
from nla_ray.activation.positions import EncodedText, Skipped, TextEncoder
from nla_ray.base.layers import check_layer
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer
from nla_ray.base.prompts import build_injection_prompt, find_marker
from nla_ray.label.stage import drawn_labels
from nla_ray.run.artifact import Run
from nla_ray.run.identity import Split, seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.stages import INSPECTION_FORMAT, INSPECTION_NAME
from nla_ray.score.ceiling import DEPTHS, inspect_layer
from nla_ray.score.linear import DescriptionFeatures
from nla_ray.settings.config import require
from nla_ray.text.stage import read_chunks

logger = get_logger(__name__)


MAX_TRAIN = 1_500
"""Labelled train texts that the ridge regression learns from."""


def inspect_base(run: Run) -> dict[str, Any]:
    """Everything, written to `inspection.json` of the run.

    Looks at the layers of `capture.layers` and `base.layer`, or at DEPTHS when no further ones are
    named.
    """
    config = run.config
    tokenizer, shape = load_tokenizer(config.base), load_model_config(config.base)
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    layers = set(
        config.capture.layers or (int(depth * shape.num_hidden_layers) for depth in DEPTHS)
    )
    if (
        config.base.layer < shape.num_hidden_layers
    ):  # another base than the preset's may have fewer blocks
        layers.add(config.base.layer)
    layers = sorted(layers)
    check_layer(layers[-1], shape.num_hidden_layers)
    marker = find_marker(tokenizer)
    prompt = build_injection_prompt(tokenizer, marker)
    chunks = read_chunks(run, ("text_id", "doc_id", "text")).to_pylist()
    learned, held_out = (
        _labelled_texts(run, chunks, split, limit)
        for split, limit in (("train", MAX_TRAIN), ("validation", None))
    )
    for split, texts in (("train", learned), ("validation", held_out)):
        require(
            len(texts) > 0,
            f"{split} texts with a label",
            0,
            "at least one",
            "Import labels of more texts of the corpus: --label.import-path.",
        )
    logger.info(
        "inspection: %d train and %d validation texts, layers %s",
        len(learned),
        len(held_out),
        layers,
    )
    model = load_backbone(config.base, num_blocks=layers[-1] + 1)
    encoder = TextEncoder(tokenizer, config.base, config.capture)
    reader = ActivationReader(model, layers, config.capture.batch_tokens)
    (learned, known), (held_out, unknown) = (
        _read(encoder, reader, texts) for texts in (learned, held_out)
    )
    told = {
        layer: inspect_layer(
            known[layer],
            unknown[layer],
            *_features(model, tokenizer, layer, run, learned, held_out),
            [row["doc_id"] for row in held_out],
        )
        for layer in layers
    }
    results = {
        "format": INSPECTION_FORMAT,
        "base": config.base.model,
        "d_model": shape.hidden_size,
        "num_layers": shape.num_hidden_layers,
        "proposed_layer": max(
            layers, key=lambda layer: told[layer]["ceiling"]["top1_10way"]["value"]
        ),
        "marker": {
            "found": marker,
            "id": prompt.marker_id,
            "neighbours": list(prompt.neighbours),
            "configured": config.base.marker,
        },
        "texts": {
            "train": len(learned),
            "validation": len(held_out),
            "positions": config.capture.positions,
        },
        "layers": {str(layer): one for layer, one in told.items()},
    }
    (run.root / INSPECTION_NAME).write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    )
    return results


def _labelled_texts(
    run: Run, chunks: list[dict[str, str]], split: Split, limit: int | None
) -> list[dict[str, str]]:
    """Those of `chunks` that are a split's and have a label, with the drawn one, at most `limit`,
    chosen by seed."""
    labels = drawn_labels(run, split)
    rows = [{**row, "label": labels[row["text_id"]]} for row in chunks if row["text_id"] in labels]
    return sorted(rows, key=lambda row: seed_of(0, "inspect", row["text_id"]))[:limit]


def _read(
    encoder: TextEncoder, reader: ActivationReader, texts: list[dict[str, str]]
) -> tuple[list[dict[str, str]], dict[int, Tensor]]:
    """The texts that can be captured, and by layer their activations at the first position, [texts,
    d_model]."""
    kept: list[dict[str, str]] = []
    encoded: list[EncodedText] = []
    for row in texts:
        try:
            encoded.append(encoder.encode(row["text_id"], row["text"]))
        except Skipped as error:
            logger.warning("inspection: %s", error)
            continue
        kept.append(row)
    found = reader.read(encoded)
    return kept, {
        layer: torch.from_numpy(np.stack([array[0] for array in arrays]))
        for layer, arrays in found.items()
    }


def _features(model, tokenizer, layer: int, run: Run, *texts: list[dict[str, str]]) -> list[Tensor]:
    """Features of the texts' labels for the linear reconstructor of a layer: the stream in the
    middle below it."""
    features = DescriptionFeatures(
        model, tokenizer, layer=layer // 2, max_tokens=run.config.judge_scorer.max_tokens
    )
    return [features([row["label"] for row in rows]) for rows in texts]
