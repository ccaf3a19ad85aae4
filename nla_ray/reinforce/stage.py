"""The GRPO stage as the driver sees it: contrastive GRPO of the verbalizer, step by step.

checks -> actors and train bank -> training data (schedule, source texts, wrong rows, what the
monitor watches) -> training -> manifest. Knows the run; TRL is in `grpo.py`. Protects two rules:
train documents only; batches are a function of the configuration, so that a resumed run meets the
same batches.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nla_ray.activation.bank import ActivationTable, drawn_rows
from nla_ray.activation.stage import load_activations, load_stats
from nla_ray.base.gpus import check_gpus_of_base
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_model_config
from nla_ray.cluster.actors import ActorPool, SharedArray
from nla_ray.cluster.resources import demand, require_resources
from nla_ray.reinforce.differences import TrainDifferences, WrongRows, draw_train_differences
from nla_ray.reinforce.grpo import grpo_worker
from nla_ray.reinforce.live import live_view
from nla_ray.reinforce.monitor import JUDGE_COSINE, WARNED, MonitorData
from nla_ray.reinforce.records import SECONDS, monitor_share
from nla_ray.reinforce.rewards import WrongActivations, schedule_rows
from nla_ray.reinforce.rollouts import RolloutWorker
from nla_ray.reinforce.scoring import ScorerWorker
from nla_ray.reinforce.steps import TrainingData
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest, check_disjoint
from nla_ray.run.metrics import METRICS_NAME
from nla_ray.score.comparisons import Comparisons, hard_rows
from nla_ray.settings.config import GRPOSettings, RunConfig
from nla_ray.settings.fit import check_stage
from nla_ray.settings.resources import gpus_of
from nla_ray.training.workers import run_training

logger = get_logger(__name__)


ALGORITHM = "2"
"""Version of what settings do not tell of a training, part of its identity. Since 2 credit by line
pays what a line gains on its group, and ratios are taken against the sampler. What was made
before has none."""
_NEAR_POOL = 32
"""Nearest activations of the same domain that the near ones are drawn from."""


def train_grpo(run: Run) -> Manifest:
    """Sharpen the SFT verbalizer by the reward scorer.

    Skipped when complete, by whichever version of the algorithm; resumed from its last checkpoint.
    Raises ValueError for a missing artifact (naming its job), a cluster that is too small, settings
    that do not fit, or a training that another version of the algorithm has begun.
    """
    name = run.config.grpo.artifact
    parents = run.parents_of("grpo")
    check_disjoint(parents["reward_scorer"], parents["judge_scorer"])
    info = base_info(run.config.base)
    for parent in parents.values():
        check_base(parent, info)
    check_stage(run.config, "grpo")
    stage = run.open("grpo", parents=parents, algorithm=ALGORITHM)
    if stage.manifest is not None:
        logger.info("%s: complete, skipped", name)
        return stage.manifest
    check_gpus_of_base(load_model_config(run.config.base), run.config.compute)
    require_room(run.config)
    train, validation = load_activations(run, "train"), load_activations(run, "validation")
    differences = draw_train_differences(train, run.config.grpo, mean_direction_of(run))
    pools = actor_pools(run, train, validation, differences)
    with pools as (injected, rollouts, scorers):
        data = training_data(run, train, validation, injected, differences)
        records = run.root / name / "scratch" / METRICS_NAME
        with live_view(records, name, run.config.grpo.steps) as is_drawn:
            arguments = {
                "data": data,
                "rollouts": rollouts,
                "scorers": scorers,
                "tells_steps": not is_drawn,
            }
            trained = run_training(run, name, grpo_worker, arguments)
    lines = (stage.location / METRICS_NAME).read_text().splitlines()
    return stage.publish(
        documents={"train": train.doc_ids, "validation": data.monitor.doc_ids},
        model=info.to_dict(),
        metrics=summary([json.loads(line) for line in lines], trained["published_step"]),
    )


def require_room(config: RunConfig) -> None:
    """Raise ValueError unless trainer, rollout and scorer actors find room at once."""
    compute, settings = config.compute, config.grpo
    require_resources(
        compute,
        [
            demand(compute, "trainer", compute.trainer_workers),
            demand(compute, "rollout", settings.num_rollout_actors),
            demand(compute, "scorer", settings.num_scorer_actors),
        ],
    )


@contextmanager
def actor_pools(
    run: Run,
    train: ActivationTable,
    validation: ActivationTable,
    differences: TrainDifferences | None = None,
) -> Iterator[tuple[SharedArray, ActorPool, ActorPool]]:
    """What is injected of train in the object store, rollout and scorer actors, for a with-block.

    [rows, vectors, d_model], or the activations [rows, d_model] where it is nothing else. Rows of
    differences stand behind those of activations.
    """
    # Actors run in other folders: a local run directory must be absolute.
    run_dir = str(run.root) if run.root.is_local else run.config.run_dir
    config = dataclasses.replace(run.config, run_dir=run_dir)
    settings, compute = config.grpo, config.compute
    if differences is None:
        bank = SharedArray(train.vectors.numpy())
        injected = bank if train.views is None else SharedArray(train.views.numpy())
    else:
        bank = SharedArray(torch.cat([train.vectors, differences.compared]).numpy())
        injected = SharedArray(torch.cat([train.injected, differences.injected]).numpy())
    validation_bank = SharedArray(validation.injected.numpy())
    pools: list[ActorPool] = []
    try:
        pools.append(
            ActorPool(
                "rollout",
                RolloutWorker,
                (
                    config.base,
                    config.sft.lora,
                    compute.threads,
                    injected,
                    validation_bank,
                    gpus_of(compute, "rollout"),
                ),
                count=settings.num_rollout_actors,
                compute=compute,
            )
        )
        pools.append(
            ActorPool(
                "scorer",
                ScorerWorker,
                (config, bank),
                count=settings.num_scorer_actors,
                compute=compute,
            )
        )
        yield injected, pools[0], pools[1]
    finally:
        for pool in pools:
            pool.close()


def training_data(
    run: Run,
    train: ActivationTable,
    validation: ActivationTable,
    injected: SharedArray,
    differences: TrainDifferences | None = None,
) -> TrainingData:
    """Schedule, source texts, wrong rows, and what the monitor watches.

    Raises ValueError when there are too few activations or documents for any of them.
    """
    settings, mean = run.config.grpo, mean_direction_of(run)
    of_activations = settings.prompts_per_step - settings.differences_per_step
    schedule = schedule_rows(len(train.ids), of_activations, settings.num_batches, settings.seed)
    contrasted = settings.contrast == "wrong"
    of_activation = wrong_activations(train, settings, mean) if contrasted else None
    wrong: WrongActivations | WrongRows | None = of_activation
    sources = {row: train.texts[row] for row in sorted(set(chain.from_iterable(schedule)))}
    without: dict[int, str] = {}
    if differences is not None:
        schedule = differences.schedule(schedule, settings.differences_per_step)
        firsts, without = differences.texts_of([*chain.from_iterable(schedule)], train.texts)
        sources |= firsts
        if of_activation is not None:
            wrong = WrongRows(of_activation, differences, settings)
    return TrainingData(
        schedule=schedule,
        sources=sources,
        without=without,
        bank=injected,
        wrong=wrong,
        monitor=watched_activations(validation, settings, mean),
    )


def mean_direction_of(run: Run) -> Tensor:
    """The train mean direction [d_model]."""
    return torch.tensor(load_stats(run)["mean_direction"])


def wrong_activations(
    train: ActivationTable, settings: GRPOSettings, mean: Tensor
) -> WrongActivations:
    """What the descriptions of a train activation must not fit, ready to be drawn from."""
    near = None
    if settings.num_near:
        pool = min(_NEAR_POOL, len(train.ids) // 2)
        near = hard_rows(train.vectors, train.family_ids, train.domains, mean, pool).tolist()
    return WrongActivations(train.family_ids, settings.num_wrong, near, settings.num_near)


def watched_activations(
    validation: ActivationTable, settings: GRPOSettings, mean: Tensor
) -> MonitorData:
    """A seeded choice of validation activations for the monitor."""
    seed = seed_of(settings.seed, "monitor")
    rows = drawn_rows(len(validation), settings.monitor_activations, seed)
    watched = validation.select(rows)
    return MonitorData(
        rows=rows,
        comparisons=Comparisons.draw(
            watched.vectors, watched.doc_ids, mean, settings.seed, family_ids=watched.family_ids
        ),
        doc_ids=watched.doc_ids,
        family_ids=watched.family_ids,
        texts=watched.texts,
    )


def summary(records: Sequence[Mapping[str, Any]], published_step: int) -> dict[str, Any]:
    """What the manifest says of a training, from its records of steps and readings.

    The readings of the SFT verbalizer, of the published checkpoint and of the end; the steps that
    were warned of; mean seconds of a step; the monitor's share of the time.
    """
    readings = [record for record in records if JUDGE_COSINE in record]
    steps = [record for record in records if SECONDS + "step" in record]
    return {
        "published_step": published_step,
        "published": next(reading for reading in readings if reading["step"] == published_step),
        "sft": readings[0],
        "last": readings[-1],
        "warned_steps": [reading["step"] for reading in readings if reading[WARNED]],
        # The first step waits for the actors to start.
        "mean_seconds": _mean_seconds(steps[1:]),
        "monitor_share": monitor_share(steps, readings),
    }


def _mean_seconds(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds of every part of a step; nothing of no steps."""
    if not steps:
        return {}
    names = [name for name in steps[0] if name.startswith(SECONDS)]
    return {
        name.removeprefix(SECONDS): sum(record[name] for record in steps) / len(steps)
        for name in names
    }
