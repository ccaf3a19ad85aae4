"""Fits the linear scorer, the third one: ridge regression from features of labels to activations.

It learns from the judge scorer's descriptions, so it shares no train document with the reward
scorer, and the penalty is chosen on validation documents. Seconds of work in one process, no Ray
Train.
"""

from __future__ import annotations

import dataclasses

import torch

from nla_ray.activation.stage import load_stats
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.cluster.resources import run_placed
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.comparisons import derangement
from nla_ray.score.linear import PENALTIES, DescriptionFeatures, LinearReconstructor, fit, predict
from nla_ray.settings.config import RunConfig
from nla_ray.training.reconstruction import load_examples, validation_figures

logger = get_logger(__name__)


def fit_linear_scorer(run: Run) -> Manifest:
    """Artifact `linear_scorer`, unless it is complete; its manifest.

    Raises ValueError for too few labelled documents.
    """
    if _open_stage(run).manifest is None:
        run_placed(run.config, "scorer", make_linear_scorer)
    return run.require("linear_scorer")


def _open_stage(run: Run) -> Artifact:
    check_base(run.require("activations"), base_info(run.config.base))
    return run.open("linear_scorer")


def make_linear_scorer(config: RunConfig) -> None:
    """The whole of it, in this process."""
    run, settings = Run(config), config.linear_scorer
    stage = _open_stage(run)
    layer = config.base.layer // 2 if settings.layer is None else settings.layer
    mean = torch.tensor(load_stats(run)["mean_direction"])
    features = DescriptionFeatures(
        load_backbone(config.base, num_blocks=layer + 1),
        load_tokenizer(config.base),
        layer=layer,
        max_tokens=config.judge_scorer.max_tokens,
    )
    as_judge = dataclasses.replace(config.judge_scorer, max_examples=settings.max_examples)
    train, validation = (load_examples(run, split, as_judge) for split in ("train", "validation"))
    if len(train.descriptions) < 2:
        raise ValueError(
            f"train examples of the linear scorer: got {len(train.descriptions)}, expected at least"
            " two. Use a larger corpus, label more texts or raise --linear-scorer.max-examples."
        )
    wrong = derangement(validation.family_ids, settings.seed)
    learned, held_out = features(train.descriptions), features(validation.descriptions)
    best: tuple[float, dict[str, float], dict[str, torch.Tensor]] | None = None
    for penalty in PENALTIES:
        tensors = fit(learned, train.targets, mean, penalty)
        figures = validation_figures(
            mean + predict(held_out, tensors), validation.targets, mean, wrong
        )
        if best is None or figures["eval_centred_cosine"] > best[1]["eval_centred_cosine"]:
            best = (penalty, figures, tensors)
    penalty, figures, tensors = best
    logger.info(
        "linear_scorer: %d descriptions, layer %d, penalty %g, centred cosine %.4f on validation",
        len(train.descriptions),
        layer,
        penalty,
        figures["eval_centred_cosine"],
    )
    with stage.local_folder() as folder:
        LinearReconstructor(features, tensors).save(folder)
    stage.publish(
        documents={
            split: sorted(set(part.doc_ids))
            for split, part in (("train", train), ("validation", validation))
        },
        model=base_info(config.base).to_dict(),
        metrics={
            **figures,
            "penalty": penalty,
            "layer": layer,
            "examples": len(train.descriptions),
        },
    )
