"""Fits the linear scorer, the third one: ridge regression from features of labels to activations.

It learns from the judge scorer's descriptions, so it shares no train document with the reward
scorer, and the penalty is chosen on validation documents. Where the verbalizer describes several
layers (`base.further_layers`), the same features are fitted to the activations of each: this is the
one scorer that a report by layer has. Seconds of work in one process, no Ray Train.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nla_ray.activation.stage import load_stats
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.cluster.resources import run_placed
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.comparisons import derangement
from nla_ray.score.linear import (
    FILE_NAME,
    PENALTIES,
    DescriptionFeatures,
    LinearReconstructor,
    fit,
    further_file,
    predict,
)
from nla_ray.settings.config import RunConfig
from nla_ray.training.reconstruction import load_examples, validation_figures

_SPLITS = ("train", "validation")

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
    run, settings, base = Run(config), config.linear_scorer, config.base
    stage = _open_stage(run)
    depth = base.layer // 2 if settings.layer is None else settings.layer
    features = DescriptionFeatures(
        load_backbone(base, num_blocks=depth + 1),
        load_tokenizer(base),
        layer=depth,
        max_tokens=config.judge_scorer.max_tokens,
    )
    as_judge = dataclasses.replace(config.judge_scorer, max_examples=settings.max_examples)
    train, validation = (load_examples(run, split, as_judge) for split in _SPLITS)
    if len(train.descriptions) < 2:
        raise ValueError(
            f"train examples of the linear scorer: got {len(train.descriptions)}, expected at least"
            " two. Use a larger corpus, label more texts or raise --linear-scorer.max-examples."
        )
    wrong = derangement(validation.family_ids, settings.seed)
    learned, held_out = features(train.descriptions), features(validation.descriptions)
    targets = {base.layer: [train.targets, validation.targets]}
    for layer in base.further_layers:
        targets[layer] = [load_examples(run, split, as_judge, layer).targets for split in _SPLITS]
    metrics: dict[str, float] = {}
    with stage.local_folder() as folder:
        for layer, (of_train, of_validation) in targets.items():
            figures, tensors = _fit_layer(
                run, layer, (learned, of_train), (held_out, of_validation), wrong
            )
            is_own = layer == base.layer
            file = FILE_NAME if is_own else further_file(layer)
            LinearReconstructor(features, tensors).save(folder, file)
            ending = "" if is_own else f"_layer{layer}"
            metrics |= {f"{name}{ending}": value for name, value in figures.items()}
    stage.publish(
        documents={
            split: sorted(set(part.doc_ids))
            for split, part in (("train", train), ("validation", validation))
        },
        model=base_info(base).to_dict(),
        metrics={**metrics, "layer": depth, "examples": len(train.descriptions)},
    )


def _fit_layer(
    run: Run,
    layer: int,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    wrong: Tensor,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The ridge to a layer's activations with the best penalty: its figures, and its tensors.

    `train`, `validation`: features and activations, [rows, d_model] each. `wrong`: as
    `validation_figures` takes it.
    """
    mean = torch.tensor(load_stats(run, layer)["mean_direction"])
    best: tuple[dict[str, float], dict[str, Tensor]] | None = None
    for penalty in PENALTIES:
        tensors = fit(*train, mean, penalty)
        predicted = mean + predict(validation[0], tensors)
        figures = validation_figures(predicted, validation[1], mean, wrong)
        if best is None or figures["eval_centred_cosine"] > best[0]["eval_centred_cosine"]:
            best = ({**figures, "penalty": penalty}, tensors)
    assert best is not None
    logger.info(
        "linear_scorer: %d descriptions, activations of layer %d, penalty %g, centred cosine %.4f"
        " on validation",
        len(train[0]),
        layer,
        best[0]["penalty"],
        best[0]["eval_centred_cosine"],
    )
    return best
