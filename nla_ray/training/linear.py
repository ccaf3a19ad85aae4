"""Fits the linear scorer, the third one: ridge regression from features of labels to activations.

It learns from the judge scorer's half of the documents, so it shares no train document with the reward scorer, and the
penalty is chosen on validation documents. Seconds of work in one process, no Ray Train.
"""

from __future__ import annotations

import torch

from nla_ray.activations import ActivationTable, check_base, load_activations, load_stats
from nla_ray.artifacts import Run
from nla_ray.cluster import run_placed
from nla_ray.config import RunConfig
from nla_ray.evaluation.metrics import derangement
from nla_ray.labels.stage import drawn_labels
from nla_ray.manifest import Manifest
from nla_ray.models.backbone import base_info, load_backbone, load_tokenizer
from nla_ray.models.linear import DescriptionFeatures, LinearReconstructor, fit, predict
from nla_ray.records import Split, document_half, seed_of
from nla_ray.runlog import get_logger
from nla_ray.training.reconstruction import validation_figures

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean squared feature; the one with the highest centred cosine on validation is kept."""

logger = get_logger(__name__)


def fit_linear_scorer(run: Run) -> Manifest:
    """Artifact `linear_scorer`, unless it is complete; its manifest. Raises ValueError for too few labelled documents."""
    stage = run.stage("linear_scorer", "base", "linear_scorer", parents=_parents(run))
    if stage.manifest is None:
        run_placed(run.config, "scorer", make_linear_scorer)
    return run.require("linear_scorer", "sft")


def _parents(run: Run) -> dict[str, Manifest]:
    parents = {"activations": run.require("activations", "capture"), "labels": run.require("labels", "label")}
    check_base(parents["activations"], base_info(run.config.base))
    return parents


def make_linear_scorer(config: RunConfig) -> None:
    """The whole of it, in this process."""
    run, settings = Run(config), config.linear_scorer
    stage = run.stage("linear_scorer", "base", "linear_scorer", parents=_parents(run))
    layer = config.base.layer // 2 if settings.layer is None else settings.layer
    mean = torch.tensor(load_stats(run)["mean_direction"])
    features = DescriptionFeatures(load_backbone(config.base, num_blocks=layer + 1), load_tokenizer(config.base),
                                   layer=layer, max_tokens=config.judge_scorer.max_tokens)
    train_labels, train = _labelled(run, "train", settings.max_examples)
    labels, validation = _labelled(run, "validation", None)
    wrong = derangement(validation.doc_ids, settings.seed)
    known, held_out = features(train_labels), features(labels)
    best: tuple[float, dict[str, float], dict[str, torch.Tensor]] | None = None
    for penalty in PENALTIES:
        tensors = fit(known, train.vectors, mean, penalty)
        figures = validation_figures(mean + predict(held_out, tensors), validation.vectors, mean, wrong)
        if best is None or figures["eval_centred_cosine"] > best[1]["eval_centred_cosine"]:
            best = (penalty, figures, tensors)
    penalty, figures, tensors = best
    logger.info("linear_scorer: %d descriptions, layer %d, penalty %g, centred cosine %.4f on validation",
                len(train_labels), layer, penalty, figures["eval_centred_cosine"])
    with stage.local_folder() as folder:
        LinearReconstructor(features, tensors).save(folder)
    stage.publish(documents={"train": train.doc_ids, "validation": validation.doc_ids}, model=base_info(config.base).to_dict(),
                  metrics={**figures, "penalty": penalty, "layer": layer, "examples": len(train_labels)})


def _labelled(run: Run, split: Split, limit: int | None) -> tuple[list[str], ActivationTable]:
    """Drawn labels and activations of the judge's half of a split, at most `limit` (chosen by seed)."""
    config, table = run.config, load_activations(run, split)
    labels = drawn_labels(run, split)
    kept = [row for row, (text_id, doc_id) in enumerate(zip(table.text_ids, table.doc_ids))
            if text_id in labels and document_half(doc_id) == config.judge_scorer.document_half]
    if limit is not None:
        kept = sorted(sorted(kept, key=lambda row: seed_of(config.linear_scorer.seed, "example", table.ids[row]))[:limit])
    if len(kept) < 2:
        raise ValueError(f"{split} examples of the linear scorer: got {len(kept)} labelled activations in the judge's half of the "
                         "documents, expected at least two. Use a larger corpus or label more texts.")
    table = table.select(kept)
    return [labels[text_id] for text_id in table.text_ids], table
