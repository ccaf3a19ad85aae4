"""What every training stage shares: Ray Train workers, restarts, precision and DeepSpeed.

A stage calls `run_training`, which starts Ray Train workers that each run the stage's
`worker_fn(config)`; a worker makes its trainer from `trainer_arguments`, resumes from
`Checkpoints.last()` and hands what is to be published to `Checkpoints.offer`. Knows nothing of
models, losses or data. Protects two rules: a stage that is cut off anywhere goes on from its newest
complete checkpoint, and the best evaluation is what is published.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_model_config
from nla_ray.cluster.environment import kind_environment
from nla_ray.cluster.resources import demand, require_resources
from nla_ray.cpu import door
from nla_ray.plan.facts import recomputes_activations
from nla_ray.plan.sizes import sizes_in
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.run.metrics import METRICS_NAME
from nla_ray.settings.config import ComputeConfig, RunConfig
from nla_ray.settings.fit import check_stage
from nla_ray.settings.resources import resources_of
from nla_ray.training.checkpoints import BEST_NAME
from nla_ray.training.zero import deepspeed_config

logger = get_logger(__name__)


_REFUSED = "refused"
"""Key of a worker's result that is the message of its ValueError."""
_MAX_FAILURES = 3
"""Deaths of workers in one stage that are made good."""
_POLL_SECONDS = 0.2
"""How often Ray Train asks its workers whether they are done."""
_CLUSTER_HELPERS = ("PlacementGroupCleanerCallback", "DatasetsCallback")


# The driver's side --------------------------------------------------------------------------------


def run_training(
    run: Run,
    name: str,
    worker_fn: Callable[[dict[str, Any]], dict[str, Any] | None],
    worker_config: dict[str, Any],
) -> dict[str, Any]:
    """Run `worker_fn` in Ray Train workers; their best offer becomes artifact `name`'s files.

    Returns what rank 0 returned. `worker_fn` gets `worker_config` with two keys added: `run` (the
    RunConfig, its run directory made absolute) and `name`. A worker that dies is started again,
    three times at most, and goes on from its last checkpoint. Raises ValueError when the cluster
    has no room for the workers, and the workers' own ValueError at once: starting again would not
    mend it.
    """
    compute = run.config.compute
    require_resources(compute, [demand(compute, "trainer", compute.trainer_workers)])
    # Two seconds by default, at every start and end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_SECONDS))
    # It prints what libraries print into a captured stdout, twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    absolute = dataclasses.replace(
        run.config, run_dir=str(run.root) if run.root.is_local else run.config.run_dir
    )
    scratch = run.root / name / "scratch"
    trainer = _trainer_class()(
        _telling_refusals(worker_fn),
        train_loop_config={**worker_config, "run": absolute, "name": name},
        torch_config=TorchConfig(backend=None if compute.trainer_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.trainer_workers,
            use_gpu=bool(compute.trainer_gpus),
            resources_per_worker=resources_of(compute, "trainer"),
        ),
        run_config=RayRunConfig(
            name="ray",
            storage_path=scratch.path,
            storage_filesystem=scratch.filesystem,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": kind_environment(compute, "trainer")},
        ),
    )
    returned = trainer.fit().return_value or {}
    if _REFUSED in returned:
        raise ValueError(returned[_REFUSED])
    collect_result(run, name)
    return returned


def _telling_refusals(
    worker_fn: Callable[[dict[str, Any]], dict[str, Any] | None],
) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """`worker_fn`, returning the message of a ValueError instead of raising it.

    A ValueError is what a user caused, and so the same on every rank; Ray Train would start the
    workers again for it.
    """

    def work(config: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return worker_fn(config)
        except ValueError as error:
            return {_REFUSED: str(error)}

    return work


def train_on_labels(
    run: Run, name: str, worker_fn: Callable[[dict[str, Any]], dict[str, Any]]
) -> Manifest:
    """The artifact of a stage that `worker_fn` learns from activations and labels; its manifest.

    Its settings are the section of the stage's name. Skipped when complete. `worker_fn` returns
    `documents`, `model` and `metrics` for the manifest. What a user can have set wrong is said
    before anything is begun.
    """
    check_base(run.require("activations"), base_info(run.config.base))
    check_stage(run.config, name)
    stage = run.open(name)
    if stage.manifest is not None:
        logger.info("%s: complete, skipped", stage.name)
        return stage.manifest
    result = run_training(run, stage.name, worker_fn, {})
    return stage.publish(
        documents=result["documents"], model=result["model"], metrics=result["metrics"]
    )


def collect_result(run: Run, name: str) -> None:
    """Copy the best offer and the metrics from scratch into the artifact's folder.

    Raises RuntimeError when there is none.
    """
    scratch = run.root / name / "scratch"
    if not (scratch / BEST_NAME).exists():
        raise RuntimeError(
            f"training of {name!r}: got no {BEST_NAME} in {scratch}, expected the record of a best"
            " checkpoint. The workers ended without an evaluation; read their log and run the job"
            " again."
        )
    best = scratch / json.loads((scratch / BEST_NAME).read_text())["folder"]
    for path in best.list_files():
        (run.root / name / path).write_bytes((best / path).read_bytes())
    (run.root / name / METRICS_NAME).write_bytes((scratch / METRICS_NAME).read_bytes())


class LeanTorchTrainer(TorchTrainer):
    """Ray Train's TorchTrainer without the helper processes that only a cluster needs.

    The cleaner of orphaned placement groups asks the dashboard every second whether the controller
    lives (an embedded Ray has no dashboard), and the data set manager serves Ray Data sets, of
    which training here has none. Each is a Python process: a second of a core at start, and some
    after.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ not in _CLUSTER_HELPERS]


def _trainer_class() -> type[TorchTrainer]:
    """The lean trainer on a single node.

    There Ray Train needs no watcher either, which waits for the cloud to take a node away.
    """
    if len(ray.nodes()) > 1:
        return TorchTrainer
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return LeanTorchTrainer


# Precision, threads, DeepSpeed --------------------------------------------------------------------


def prepare_worker(compute: ComputeConfig) -> None:
    """Set up a worker process: torch threads, one voice for all workers, DeepSpeed's device."""
    if os.environ.get("RANK", "0") != "0":
        logger.parent.setLevel(logging.WARNING)
    torch.set_num_threads(compute.threads)
    if door.is_for_kind(compute, "trainer"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def trainer_arguments(
    run_config: RunConfig, folder: Path, *, seed: int, blocks: int, tokens: int
) -> dict[str, Any]:
    """Arguments that every trainer (transformers' or TRL's) gets.

    They are the device, DeepSpeed, checkpoints and seeds; there is no telemetry. `blocks`: of the
    base that have gradients. `tokens`: of the largest micro-batch, padding included.
    """
    compute = run_config.compute
    on_gpu = not door.is_for_kind(compute, "trainer")
    return {
        "output_dir": str(folder),
        "use_cpu": not on_gpu,
        "deepspeed": deepspeed_config(compute),
        "bf16": False,
        "fp16": False,
        "activation_checkpointing": on_gpu
        and recomputes_activations(
            run_config, sizes_in(load_model_config(run_config.base)), blocks, tokens
        ),
        "seed": seed,
        "data_seed": seed,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        "log_level": "error",
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
    }
