"""What a base model is like before anything is trained on it: which marker, which layer, which
injection norm.

texts, labels -> activations of several layers in one pass -> for each layer its norms and the gold
ceiling: how well a ridge regression from features of labels to activations tells validation
activations apart. Minutes, no adapter, nothing of test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_ray import vectors
from nla_ray.activations import ActivationReader, EncodedText, Skipped, TextEncoder
from nla_ray.artifacts import Run
from nla_ray.config import require
from nla_ray.corpus.build import build_corpus, read_chunks
from nla_ray.evaluation.bootstrap import DocumentBootstrap
from nla_ray.evaluation.metrics import Comparisons, Figure, figures
from nla_ray.injection import build_injection_prompt, find_marker
from nla_ray.labels.stage import drawn_labels, label_texts
from nla_ray.models.backbone import check_layer, load_backbone, load_model_config, load_tokenizer
from nla_ray.models.decoder import decoder_shape
from nla_ray.models.linear import DescriptionFeatures, fit, predict
from nla_ray.records import Split, seed_of
from nla_ray.runlog import INSPECTION_FORMAT, INSPECTION_NAME, get_logger
from nla_ray.training.linear import PENALTIES
from nla_ray.vectors import norm

PUBLIC_DEPTH = 20 / 28
"""Share of the blocks below the layer that public verbalizers read (block 20 of 28)."""
DEPTHS = (0.35, 0.5, 0.6, PUBLIC_DEPTH, 0.82)
_CEILING = ("top1_2way", "top1_10way", "centred_cosine", "fve")
MAX_TRAIN = 1_500
"""Labelled train texts that the ridge regression learns from."""

logger = get_logger(__name__)


def inspect_base(run: Run) -> dict[str, Any]:
    """Everything, written to `inspection.json` of the run. Makes corpus and labels first, where
    they are missing.

    Looks at the layers of `capture.layers` and `base.layer`, or at DEPTHS when no further ones are
    named.
    """
    config = run.config
    tokenizer, shape = load_tokenizer(config.base), load_model_config(config.base)
    decoder_shape(shape)  # what the engine cannot run is not worth an inspection
    build_corpus(run)
    label_texts(run)
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


def inspect_layer(
    known: Tensor, unknown: Tensor, features: Tensor, held_out: Tensor, doc_ids: Sequence[str]
) -> dict[str, Any]:
    """One layer: norms of the train activations [n, d_model], and the gold ceiling on validation
    activations [m, d_model].

    `features`, `held_out`: of their labels, [n, d_model] and [m, d_model]. The ridge penalty with
    the best centred cosine counts: it is chosen on the rows that the ceiling is told of, so the
    ceiling serves to choose by and is no evidence. The 2-way choice is by centred cosine: raw, gold
    labels fail it where activations differ in their distance to the mean.
    """
    norms, mean = norm(known)[:, 0], vectors.mean_direction(known)
    comparisons, bootstrap = (
        Comparisons.draw(unknown, doc_ids, mean, seed=0),
        DocumentBootstrap(doc_ids),
    )
    tried: list[tuple[float, dict[str, Figure]]] = []
    for penalty in PENALTIES:
        read = mean + predict(held_out, fit(features, known, mean, penalty))
        tried.append((penalty, figures(read, comparisons)))
    penalty, best = max(tried, key=lambda one: one[1]["centred_cosine"].value)
    return {
        "mean_norm": norms.mean().item(),
        "norm_quantiles": {str(share): norms.quantile(share).item() for share in (0.01, 0.5, 0.99)},
        "injection_norm": round_up(norms.mean().item()),
        "cosine_with_mean": vectors.cosine(known, mean).mean().item(),
        "penalty": penalty,
        "ceiling": {
            name: interval.to_dict()
            for name, interval in bootstrap.intervals(
                {name: best[name] for name in _CEILING}
            ).items()
        },
    }


def round_up(value: float) -> float:
    """The next number of two digits whose second one is 0 or 5: 472 -> 500, 43.2 -> 45."""
    step = 5 * 10 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / step) * step


def describe_inspection(results: dict[str, Any]) -> list[str]:
    """For a terminal: what was found, and the flags that say so."""
    marker = results["marker"]
    lines = [
        (
            f"{results['base']}: {results['num_layers']} blocks, d_model {results['d_model']};"
            f" ceiling of gold labels by ridge regression on {results['texts']['train']} train"
            f" texts, of {results['texts']['validation']} validation texts"
        ),
        (
            f"marker {marker['found']!r} (id {marker['id']}, between {marker['neighbours'][0]} and"
            f" {marker['neighbours'][1]}); configured {marker['configured']!r}"
        ),
        (
            "layer  depth  mean norm  1% to 99%        cos with mean  2-way  10-way  centred"
            " cosine, 95%    FVE"
        ),
    ]
    for layer, one in results["layers"].items():
        ceiling, quantiles = (
            {name: figure["value"] for name, figure in one["ceiling"].items()},
            one["norm_quantiles"],
        )
        told = "{value:.3f} {low:.3f} to {high:.3f}".format(**one["ceiling"]["centred_cosine"])
        lines.append(
            f"{layer:>5}  {int(layer) / results['num_layers']:5.2f}  {one['mean_norm']:9.1f} "
            f" {quantiles['0.01']:7.1f} {quantiles['0.99']:8.1f}  {one['cosine_with_mean']:13.3f} "
            f" {ceiling['top1_2way']:5.3f}  {ceiling['top1_10way']:6.3f}  {told:>19} "
            f" {ceiling['fve']:5.3f}"
        )
    best = results["proposed_layer"]
    lines.append(
        f"best ceiling (10-way): --base.layer {best} --base.injection-norm"
        f" {results['layers'][str(best)]['injection_norm']:g} --base.marker {marker['found']};"
        f" {PUBLIC_DEPTH:.0%} depth is layer {int(PUBLIC_DEPTH * results['num_layers'])}"
    )
    return lines


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
