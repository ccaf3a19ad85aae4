"""The stage `reward_scorer_refreshed`: the reward scorer, trained on with what SFT itself writes.

The reward scorer has read labels alone, and a verbalizer does not write as teachers do. A gain of
GRPO that only such a scorer sees may be one of style: so the report reads SFT and GRPO with both, a
scorer trained on labels and this one, to which the verbalizer's way of writing is no news.

SFT describes train activations of the documents that the reward scorer learned from; from that
scorer's weights, this one learns from those descriptions and from the labels of the same texts,
half of each. It shares no document with the judge, the linear scorer, validation and test.

It may read descriptions in a report, and pay a verbalizer in a run of its own. It may not judge:
it has the documents and the weights of the scorer that pays GRPO, so it chooses no checkpoint and
stands for no independent opinion.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations
from nla_ray.base.adapter_files import adapter_digest
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.cluster.resources import run_placed
from nla_ray.description.files import DescriptionFile, descriptions_in
from nla_ray.description.protocol import generation_protocol
from nla_ray.description.record import Description
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.label.stage import activation_subjects
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.settings.config import ReconstructorConfig, RunConfig
from nla_ray.settings.fit import check_stage
from nla_ray.training.attention import training_attention
from nla_ray.training.reconstruction import (
    Examples,
    load_examples,
    scorer_labels,
    train_reconstructor,
)
from nla_ray.training.workers import prepare_worker, run_training

NAME = "reward_scorer_refreshed"
"""Of the stage, its artifact and its section of the configuration."""
_DESCRIPTIONS = "descriptions.jsonl"
_CHUNK = 512
"""Activations handed to the engine at once."""
_SLOTS = 256
"""Descriptions written at once."""

logger = get_logger(__name__)


def refresh_reward_scorer(run: Run) -> Manifest:
    """The stage: the artifact's manifest. Skipped when complete.

    The descriptions are written by one process that is placed like one of the scorers, the
    training runs in Ray Train workers. Either goes on where it was cut off.
    """
    check_base(run.require("activations"), base_info(run.config.base))
    check_stage(run.config, "reward_scorer_refreshed")
    stage = run.open(NAME)
    if stage.manifest is not None:
        logger.info("%s: complete, skipped", stage.name)
        return stage.manifest
    run_placed(run.config, "scorer", describe_train)
    result = run_training(run, NAME, _train, {})
    return stage.publish(
        documents=result["documents"], model=result["model"], metrics=result["metrics"]
    )


# What it learns from ------------------------------------------------------------------------------


def refreshing_rows(run: Run) -> tuple[ActivationTable, list[str]]:
    """The train activations that are described, and a label of each.

    They are of documents that the reward scorer learned from, `max_examples` drawn by seed. Where
    it learned from every teacher's label, one of them is drawn.
    """
    config, settings = run.config, run.config.reward_scorer_refreshed
    labels = scorer_labels(run, "train", dataclasses.replace(config.reward_scorer, labels="one"))
    table = load_activations(run, "train")
    subjects = activation_subjects(run, table)
    documents = set(run.require("reward_scorer").documents["train"])
    kept = [
        row
        for row, subject in enumerate(subjects)
        if subject in labels and table.doc_ids[row] in documents
    ]
    kept.sort(key=lambda row: seed_of(settings.seed, "refresh", table.ids[row]))
    kept = sorted(kept[: settings.max_examples])
    return table.select(kept), [labels[subjects[row]][0] for row in kept]


def describe_train(config: RunConfig) -> None:
    """Write what SFT says of these activations, greedily, into the artifact's folder."""
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run = Run(config)
    sft, (table, _) = run.require("sft"), refreshing_rows(run)
    if len(_written(run)) == len(table):  # an earlier attempt ended while it trained
        return
    with run.local_copy("sft", sft, "adapter") as adapter, run.open(NAME).local_folder() as folder:
        protocol = generation_protocol(
            config.base,
            load_tokenizer(config.base),
            max_new_tokens=config.reward_scorer_refreshed.max_new_tokens,
            weights={"base": sft.model["digest"], "adapter": adapter_digest(adapter)},
        )
        verbalizer = Verbalizer.load(
            config.base, adapter, neighbours=sft.model["neighbours"], max_slots=_SLOTS
        )

        def describe(start: int, stop: int) -> list[Description]:
            return verbalizer.describe_under(protocol, table.injected[start:stop], start)

        file = DescriptionFile(Path(folder) / _DESCRIPTIONS, table.ids, protocol)
        file.complete(describe, _CHUNK)


def refreshing_examples(run: Run) -> Examples:
    """Labels, then descriptions, of the same train activations."""
    table, labels = refreshing_rows(run)
    return Examples(
        descriptions=[*labels, *(description.text for description in _written(run))],
        targets=torch.cat([table.vectors, table.vectors]),
        doc_ids=[*table.doc_ids, *table.doc_ids],
        family_ids=[*table.family_ids, *table.family_ids],
    )


def _written(run: Run) -> list[Description]:
    """The descriptions that are written so far."""
    location = run.root / NAME / _DESCRIPTIONS
    return descriptions_in(location.read_bytes(), str(location)) if location.exists() else []


# The worker ---------------------------------------------------------------------------------------


def refreshing_settings(config: RunConfig) -> ReconstructorConfig:
    """The reward scorer's settings with those that the refreshed one has for itself."""
    own = config.reward_scorer_refreshed
    return dataclasses.replace(
        config.reward_scorer, epochs=own.epochs, learning_rate=own.learning_rate, seed=own.seed
    )


def _train(config: dict[str, Any]) -> dict[str, Any]:
    """The body of one Ray Train worker: go on from the reward scorer's weights."""
    run_config: RunConfig = config["run"]
    prepare_worker(run_config.compute)
    run, settings = Run(run_config), refreshing_settings(run_config)
    examples = {
        "train": refreshing_examples(run),
        "validation": load_examples(run, "validation", settings),
    }
    base = run_config.base
    model = load_backbone(base, num_blocks=base.layer + 1, attention=training_attention(base))
    with run.local_copy("reward_scorer", run.require("reward_scorer")) as folder:
        reconstructor = Reconstructor.load(base, folder, model=model, trainable=True)
    return train_reconstructor(run_config, NAME, reconstructor, examples, settings)
