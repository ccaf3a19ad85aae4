"""What a base is like before anything is trained on it: its marker, layer and injection norm.

texts, labels -> activations of several layers in one pass -> for each layer its norms, the gold
ceiling (how well a ridge regression from features of labels to activations tells validation
activations apart), and how true the words are that a linear probe reads in them. Minutes, no
adapter. What was measured becomes a preset file. Protects two rules: nothing of test is looked at,
and no preset file is overwritten, for people edit them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_ray.activation.capture import ActivationReader
from nla_ray.activation.positions import EncodedText, Skipped, TextEncoder
from nla_ray.activation.stage import read_answers
from nla_ray.base.families import check_layer
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer
from nla_ray.base.prompts import build_injection_prompt, find_marker
from nla_ray.base.self_check import check_reading
from nla_ray.base.sources import base_folder, tokenizer_digest
from nla_ray.label.stage import load_labels, require_labels_of
from nla_ray.run.artifact import Run
from nla_ray.run.identity import Split, seed_of
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.stages import INSPECTION_FORMAT, INSPECTION_NAME, PROPOSAL_NAME
from nla_ray.score.ceiling import DEPTHS, inspect_layer, probe_words
from nla_ray.score.linear import DescriptionFeatures
from nla_ray.score.proposal import proposal_text
from nla_ray.settings.config import RunConfig, require
from nla_ray.text.stage import families_of, read_chunks

logger = get_logger(__name__)

MAX_TRAIN = 1_500
"""Labelled train texts that the ridge regression learns from."""


def inspect_base(run: Run) -> dict[str, Any]:
    """Everything, written to `inspection.json` of the run.

    Looks at the layers of `capture.layers` and `base.layer`, or at DEPTHS when no further ones are
    named. Raises ValueError for a layer that the base does not have, and where no text has a label.
    """
    config = run.config
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    tokenizer, shape = load_tokenizer(config.base), load_model_config(config.base)
    layers = _inspected_layers(config, shape.num_hidden_layers)
    marker = _marker(tokenizer, config.base.marker)
    digest = tokenizer_digest(base_folder(config.base.model, weights=False))
    answered = run.require("answers").fingerprint if config.capture.needs_answers else None
    require_labels_of(run, config.capture.positions, digest, config.base.template, answered)
    chunks = _chunks(run)
    train = _labelled_texts(run, chunks, "train", MAX_TRAIN)
    validation = _labelled_texts(run, chunks, "validation", None)
    logger.info(
        "inspection: %d train and %d validation texts, layers %s",
        len(train),
        len(validation),
        layers,
    )
    model = load_backbone(config.base, num_blocks=layers[-1] + 1)
    check_reading(model, layers)
    # Beside the ends of texts, what the mean over a text holds.
    capture = dataclasses.replace(config.capture, text_mean=config.capture.positions == "last")
    encoder = TextEncoder(tokenizer, config.base, capture)
    reader = ActivationReader(model, layers, capture.batch_tokens)
    train, train_activations = _read(encoder, reader, train)
    validation, validation_activations = _read(encoder, reader, validation)
    family_ids = families_of(run, (row["doc_id"] for row in validation))
    by_layer = {}
    for layer in layers:
        # The stream in the middle below the layer: what the linear reconstructor reads.
        features = DescriptionFeatures(
            model, tokenizer, layer=layer // 2, max_tokens=config.judge_scorer.max_tokens
        )
        learned, held_out = train_activations[layer], validation_activations[layer]
        by_layer[layer] = _inspected(features, train, learned, validation, held_out, family_ids)
    results = {
        "format": INSPECTION_FORMAT,
        "base": config.base.model,
        "d_model": shape.hidden_size,
        "num_layers": shape.num_hidden_layers,
        "proposed_layer": max(
            layers, key=lambda layer: by_layer[layer]["ceiling"]["top1_10way"]["value"]
        ),
        "marker": marker,
        "texts": {
            "train": len(train),
            "validation": len(validation),
            "positions": config.capture.positions,
        },
        "layers": {str(layer): inspected for layer, inspected in by_layer.items()},
    }
    written = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (run.root / INSPECTION_NAME).write_text(written)
    return results


def write_preset(run: Run, results: dict[str, Any], start: RunConfig) -> Location:
    """Write the preset that an inspection proposes, beside it; returns where the file is.

    `start`: the named preset that the run's configuration started from. A file that says the same
    is left as it is. One that says anything else was edited, or is of another inspection: it stays,
    and the new one is `preset_2.toml`, or the next free number.
    """
    text = proposal_text(results, run.given, start, _named_run_dir(run))
    for number in itertools.count(1):
        stem, _, ending = PROPOSAL_NAME.partition(".")
        file = run.root / (PROPOSAL_NAME if number == 1 else f"{stem}_{number}.{ending}")
        if not file.exists():
            file.write_text(text)
        if file.read_bytes() == text.encode():
            return file
        logger.warning("inspection: %s says something else and is kept", file)
    raise AssertionError("numbers do not end")


def next_command(run: Run, file: Location) -> str:
    """What is done with a preset file that was just written, in one line."""
    path = _from_here(file.path) if file.is_local else Path(file.path).name
    arguments = ["python", "jobs/pipeline.py", "--preset", path]
    if _named_run_dir(run) is None:
        arguments += ["--run-dir", run.given.run_dir]
    before = "next" if file.is_local else "copy it to this machine, then"
    return f"preset written to {file}; {before}: {shlex.join(arguments)}"


def _named_run_dir(run: Run) -> str | None:
    """The run directory as a preset file names it; None where it holds a password."""
    run_dir = run.given.run_dir
    if "://" in run_dir:
        return None if "@" in run_dir else run_dir
    return _from_here(run_dir)


def _from_here(path: str) -> str:
    """A path that is meant from where a job is started, where it lies below that folder."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def _inspected_layers(config: RunConfig, num_layers: int) -> list[int]:
    """Ascending. Raises ValueError for a layer that the base does not have."""
    layers = set(config.capture.layers or (int(depth * num_layers) for depth in DEPTHS))
    if config.base.layer < num_layers:  # another base than the preset's may have fewer blocks
        layers.add(config.base.layer)
    check_layer(max(layers), num_layers)
    return sorted(layers)


def _marker(tokenizer, configured: str) -> dict[str, Any]:
    """The marker found for this tokenizer, and what stands around it in the verbalizer's prompt."""
    found = find_marker(tokenizer)
    prompt = build_injection_prompt(tokenizer, found)
    return {
        "found": found,
        "id": prompt.marker_id,
        "neighbours": list(prompt.neighbours),
        "configured": configured,
    }


def _inspected(
    features: DescriptionFeatures,
    train: list[dict[str, Any]],
    learned: Tensor,
    validation: list[dict[str, Any]],
    held_out: Tensor,
    family_ids: list[str],
) -> dict[str, Any]:
    """What one layer holds, by the activations of train and validation texts.

    `learned`, `held_out` [texts, 1 or 2, d_model]: of each the activation, and the text's mean.
    """
    labels, held_out_labels = ([row["label"] for row in rows] for rows in (train, validation))
    texts, held_out_texts = ([row["read"] for row in rows] for rows in (train, validation))
    of_layer = inspect_layer(
        learned[:, 0], held_out[:, 0], features(labels), features(held_out_labels), family_ids
    )
    names = ("probe", "probe_text_mean")
    probes = {
        name: probe_words(
            learned[:, number], held_out[:, number], texts, held_out_texts, family_ids
        )
        for number, name in enumerate(names[: learned.shape[1]])
    }
    return {**of_layer, **probes}


def _chunks(run: Run) -> list[dict[str, Any]]:
    """The texts of the corpus; `answer` holds what the base answers, where positions are in it."""
    answers = read_answers(run, run.config.capture)
    chunks = read_chunks(run, ("text_id", "doc_id", "text", "messages")).to_pylist()
    return [{**row, "answer": answers.get(row["text_id"], ())} for row in chunks]


def _labelled_texts(
    run: Run, chunks: list[dict[str, Any]], split: Split, limit: int | None
) -> list[dict[str, Any]]:
    """The chunks of a split that have a label, with `labels`; at most `limit`, by seed.

    `labels`: the drawn label by position, under None that of the whole text. Raises ValueError when
    there is none.
    """
    labels: dict[str, dict[int | None, str]] = {}
    for row in load_labels(run, split):
        if row["drawn"]:
            labels.setdefault(row["text_id"], {})[row.get("position")] = row["label"]
    rows = [{**row, "labels": labels[row["text_id"]]} for row in chunks if row["text_id"] in labels]
    require(
        len(rows) > 0,
        f"{split} texts with a label",
        0,
        "at least one",
        "Import labels of more texts of the corpus: --label.import-path.",
    )
    return sorted(rows, key=lambda row: seed_of(0, "inspect", row["text_id"]))[:limit]


def _read(
    encoder: TextEncoder, reader: ActivationReader, texts: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """The texts that can be captured, and their activations by layer: [texts, 1 or 2, d_model].

    The first is that of each text's first position that has a label; `label` is that one, `read`
    the text up to there. The second is the mean over the text, where the encoder asks for it.
    """
    kept: list[dict[str, Any]] = []
    encoded: list[EncodedText] = []
    for row in texts:
        try:
            found_text = encoder.encode(row["text_id"], row["text"], row["messages"], row["answer"])
        except Skipped as error:
            logger.warning("inspection: %s", error)
            continue
        labels = row["labels"]
        if None in labels:
            labels = {found_text.positions[0]: labels[None]}
        position = min(labels)
        beside = found_text.positions[1:] if found_text.averaged else []
        encoded.append(dataclasses.replace(found_text, positions=[position, *beside]))
        read = found_text.read[found_text.positions.index(position)]
        kept.append({**row, "label": labels[position], "read": read})
    found = reader.read(encoded)
    return kept, {layer: torch.from_numpy(np.stack(arrays)) for layer, arrays in found.items()}
