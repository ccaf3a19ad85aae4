"""What every training stage shares: Ray Train workers, restarts, checkpoints, precision and
DeepSpeed.

A stage calls `run_training`, which starts Ray Train workers that each run the stage's
`worker_fn(config)`; a worker makes its trainer from `trainer_arguments`, resumes from
`Checkpoints.last()` and hands what is to be published to `Checkpoints.offer`. The one module that
mentions DeepSpeed. Knows nothing of models, losses or data. Protects two rules: a stage that is cut
off anywhere goes on from its newest complete checkpoint, and the best evaluation is what is
published.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from nla_ray.activations import check_base
from nla_ray.artifacts import Location, Run
from nla_ray.cluster import demand, require_resources, resources_of
from nla_ray.config import BaseConfig, ComputeConfig, RunConfig, require
from nla_ray.manifest import Manifest
from nla_ray.models.attention import register_grouped
from nla_ray.models.backbone import base_info, computes_in_bf16, load_model_config
from nla_ray.models.decoder import decoder_shape
from nla_ray.runlog import METRICS_NAME, MetricsLog, get_logger
from nla_ray.training.trackers import Trackers

if TYPE_CHECKING:
    from transformers import Trainer

COMPLETE_NAME = "complete"
"""Empty file inside a checkpoint, written last: a checkpoint without it is torn and ignored."""
_BEST_NAME = "best.json"
_REFUSED = "refused"
_MAX_FAILURES = 3
_CHECKPOINTS_KEPT = 2
_POLL_SECONDS = 0.2
_LINE_SECONDS = 10.0
_TRIM_STEPS = 20
"""Batches of many lengths leave holes in a heap that gives nothing back by itself (see
`cluster.worker_environment`)."""
_BUCKET_ELEMENTS = 2**23
_CPU_HOUSEKEEPERS = ("PlacementGroupCleanerCallback", "DatasetsCallback")

logger = get_logger(__name__)


# The driver's side --------------------------------------------------------------------------------


def run_training(
    run: Run,
    name: str,
    worker_fn: Callable[[dict[str, Any]], dict[str, Any] | None],
    worker_config: dict[str, Any],
) -> dict[str, Any]:
    """Run `worker_fn` in Ray Train workers, put their result into artifact `name`'s folder, and
    return what rank 0 returned.

    `worker_fn` gets `worker_config` with two keys added: `run` (the RunConfig, its run directory
    made absolute) and `name`. A worker that dies is started again, three times at most, and goes on
    from its last checkpoint. Raises ValueError when the cluster has no room for the workers, and
    the workers' own ValueError at once: starting again would not mend it.
    """
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig

    compute = run.config.compute
    require_resources([demand(compute, "trainer", compute.trainer_workers)])
    os.environ.setdefault(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_SECONDS)
    )  # two seconds by default: at every start and end
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PRINT_PATCH", "0"
    )  # it prints what libraries print into a captured stdout, twice
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
    """A ValueError is what a user caused, and so the same on every rank: it is told instead of
    raised, for which Ray Train would start the workers again."""

    def work(config: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return worker_fn(config)
        except ValueError as error:
            return {_REFUSED: str(error)}

    return work


def train_on_labels(
    run: Run,
    name: str,
    worker_fn: Callable[[dict[str, Any]], dict[str, Any]],
    section: str | None = None,
) -> Manifest:
    """Artifact `name`, learned by `worker_fn` from activations and labels under the settings of
    `section` (None: of that name); its manifest.

    Skipped when complete. `worker_fn` returns `documents`, `model` and `metrics` for the manifest.
    What a user can have set wrong is said before anything is begun.
    """
    parents = {
        "activations": run.require("activations", "capture"),
        "labels": run.require("labels", "label"),
    }
    check_base(parents["activations"], base_info(run.config.base))
    decoder_shape(
        load_model_config(run.config.base)
    )  # what the engine cannot run is not worth a scorer
    section = section or name
    worker_batch(run.config.compute, getattr(run.config, section).batch_size)
    stage = run.stage(name, "base", section, parents=parents)
    if stage.manifest is not None:
        logger.info("%s: complete, skipped", name)
        return stage.manifest
    told = run_training(run, name, worker_fn, {})
    return stage.publish(documents=told["documents"], model=told["model"], metrics=told["metrics"])


def collect_result(run: Run, name: str) -> None:
    """Copy the best offer and the metrics from scratch into the artifact's folder. Raises
    RuntimeError when there is none."""
    scratch = run.root / name / "scratch"
    if not (scratch / _BEST_NAME).exists():
        raise RuntimeError(
            f"training of {name!r}: got no {_BEST_NAME} in {scratch}, expected the record of a best"
            " checkpoint. The workers ended without an evaluation; read their log and run the job"
            " again."
        )
    best = scratch / json.loads((scratch / _BEST_NAME).read_text())["folder"]
    for path in best.list_files():
        (run.root / name / path).write_bytes((best / path).read_bytes())
    (run.root / name / METRICS_NAME).write_bytes((scratch / METRICS_NAME).read_bytes())


def _trainer_class():
    """Ray Train's TorchTrainer; on a single node without the helper processes that only a cluster
    needs.

    The cleaner of orphaned placement groups asks the dashboard every second whether the controller
    lives (an embedded Ray has no dashboard), the watcher waits for the cloud to take a node away,
    and the data set manager serves Ray Data sets, of which training here has none. Each is a Python
    process: a second of a core at start, and some after.
    """
    import ray
    from ray.train.torch import TorchTrainer

    if len(ray.nodes()) > 1:
        return TorchTrainer
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    class LeanTorchTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list:
            return [
                one
                for one in super()._create_default_callbacks()
                if type(one).__name__ not in _CPU_HOUSEKEEPERS
            ]

    return LeanTorchTrainer


# Checkpoints --------------------------------------------------------------------------------------


def last_checkpoint(folder: Path | str) -> Path | None:
    """The newest complete `checkpoint-N` in a folder, by N; None when there is none."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE_NAME}")]
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class Checkpoints:
    """The scratch folder of one training stage, as a worker sees it: checkpoints, metrics.jsonl,
    and the best files so far.

    On a local run it is the run's own folder. On a remote one it is a temporary folder that is
    filled from the run at the start and uploaded after every checkpoint, the files that declare
    others whole last.
    """

    def __init__(self, run_config: RunConfig, name: str) -> None:
        self.location = Run(run_config).root / name / "scratch"
        self.name, self._config = name, run_config
        self.is_writer = int(os.environ.get("RANK", "0")) == 0
        self._uploaded: dict[str, tuple[int, int]] = {}
        if self.location.is_local:
            self.folder = Path(self.location.path)
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            self.folder = Path(tempfile.mkdtemp(prefix=f"nla_ray_{name}_"))
            self._download()
        record = self.folder / _BEST_NAME
        self.best: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
        """Step, value and metrics of the best offer so far; empty before the first."""

    def last(self) -> str | None:
        """The checkpoint to resume from, as `Trainer.train(resume_from_checkpoint=...)` takes
        it."""
        found = last_checkpoint(self.folder)
        if found is not None:
            logger.info("going on from step %d", _step_of(found))
        return str(found) if found else None

    def metrics_log(self) -> MetricsLog:
        """The stage's metrics, cut back to the checkpoint that training resumes from."""
        log = MetricsLog(self.folder / METRICS_NAME)
        if self.is_writer:
            log.rewind("step", self._last_step())
        return log

    def trackers(self) -> Trackers:
        """Where the stage's metrics are shown besides, cut back alike; nowhere for a process that
        does not write."""
        if not self.is_writer:
            return Trackers()
        return Trackers.of(
            self._config, self.name, scratch=self.folder, first_step=self._last_step() + 1
        )

    def _last_step(self) -> int:
        """The step that training resumes from; -1 where it begins."""
        found = last_checkpoint(self.folder)
        return _step_of(found) if found else -1

    def offer(
        self,
        step: int,
        value: float,
        save: Callable[[Path], None],
        *,
        parameters: Iterable[nn.Parameter] = (),
        metrics: dict[str, float] | None = None,
    ) -> bool:
        """Keep what `save(folder)` writes when `value` (lower is better) beats every earlier offer;
        say whether it did.

        All ranks call it with the same value; the first one saves, while `parameters` are gathered.
        The artifact is made from the best offer: a kill at any moment leaves the one before or the
        new one, whole.
        """
        if not value < self.best.get("value", float("inf")):
            return False
        # A name of its own: a resumed run may offer a step again, whose folder the record names
        # until the new one is whole.
        folder = self.folder / f"best-{step}-{uuid.uuid4().hex[:8]}"
        with gathered(parameters):
            if self.is_writer:
                folder.mkdir()
                save(folder)
        before, self.best = (
            self.best,
            {
                "step": step,
                "value": value,
                "folder": folder.name,
                "metrics": metrics or {},
            },
        )
        if self.is_writer:
            Location.of(self.folder / _BEST_NAME).write_text(json.dumps(self.best))
            if before:
                shutil.rmtree(self.folder / before["folder"], ignore_errors=True)
        return True

    def mark_complete(self, step: int) -> None:
        """Declare `checkpoint-{step}` whole, on a remote run after every rank has uploaded its
        part."""
        self.upload()
        _wait_for_all_ranks()
        if self.is_writer:
            (self.folder / f"checkpoint-{step}" / COMPLETE_NAME).touch()
            self.upload()

    def upload(self) -> None:
        """On a remote run: copy new and changed files to the run, and remove there what was removed
        here."""
        if self.location.is_local:
            return
        files = {
            str(path.relative_to(self.folder)): path
            for path in self.folder.rglob("*")
            if path.is_file()
        }
        for name in sorted(files, key=_declares):
            status = files[name].stat()
            state = (status.st_size, status.st_mtime_ns)
            if self._uploaded.get(name) != state:
                (self.location / name).write_bytes(files[name].read_bytes())
                self._uploaded[name] = state
        for name in sorted(set(self._uploaded) - set(files), key=_declares, reverse=True):
            (self.location / name).delete()
            del self._uploaded[name]

    def _download(self) -> None:
        for name in self.location.list_files():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.location / name).read_bytes())
            status = target.stat()
            self._uploaded[name] = (status.st_size, status.st_mtime_ns)


def _declares(name: str) -> bool:
    """Whether a file says that others are whole: written after them, removed before them."""
    return name.endswith(COMPLETE_NAME) or name == _BEST_NAME


def _wait_for_all_ranks() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


class StageCallback(TrainerCallback):
    """Writes a trainer's logs to the metrics file and trackers, tells progress every ten seconds,
    marks checkpoints complete."""

    def __init__(self, checkpoints: Checkpoints, title: str) -> None:
        self.checkpoints, self.title = checkpoints, title
        self._log, self._trackers = checkpoints.metrics_log(), checkpoints.trackers()
        self._last_line = time.monotonic()

    def record(self, metrics: dict[str, float]) -> None:
        """One record of metrics, with its `step`, to all places."""
        self._log.append(metrics)
        self._trackers.write(metrics)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.record(
            {"step": state.global_step, **{key: float(value) for key, value in logs.items()}}
        )
        if "loss" in logs and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            logger.info(
                "%s: step %d of %d, loss %.4f",
                self.title,
                state.global_step,
                state.max_steps,
                float(logs["loss"]),
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % _TRIM_STEPS == 0:
            _give_back_free_memory()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if state.is_world_process_zero and metrics:
            figures = ", ".join(
                f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items()
            )
            logger.info(
                "%s: validation at step %d of %d: %s",
                self.title,
                state.global_step,
                state.max_steps,
                figures,
            )

    def on_save(self, args, state, control, **kwargs) -> None:
        self.checkpoints.mark_complete(state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._trackers.close()


def follow(trainer: Trainer, checkpoints: Checkpoints, title: str) -> Trainer:
    """Give a trainer the stage's callback in place of the library's printing; returns the
    trainer."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageCallback(checkpoints, title))
    return trainer


def _give_back_free_memory() -> None:
    """Return the heap's free pages to the system, where the C library can."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


# Precision, threads, DeepSpeed --------------------------------------------------------------------


def prepare_worker(compute: ComputeConfig) -> None:
    """Set up a worker process: torch threads, one voice for all workers, DeepSpeed's kind of
    device."""
    if os.environ.get("RANK", "0") != "0":
        logger.parent.setLevel(logging.WARNING)
    torch.set_num_threads(compute.threads)
    if not compute.trainer_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def trainer_arguments(run_config: RunConfig, folder: Path, *, seed: int) -> dict[str, Any]:
    """Arguments that every trainer (transformers' or TRL's) gets: device, DeepSpeed, checkpoints,
    seeds, no telemetry."""
    compute = run_config.compute
    on_gpu = bool(compute.trainer_gpus)
    return {
        "output_dir": str(folder),
        "use_cpu": not on_gpu,
        "deepspeed": deepspeed_config(compute),
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": on_gpu,
        "save_total_limit": _CHECKPOINTS_KEPT,
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


def worker_batch(compute: ComputeConfig, batch_size: int) -> int:
    """One worker's share of an optimizer step's examples. Raises ValueError when they cannot be
    shared out evenly."""
    require(
        batch_size % compute.trainer_workers == 0,
        "batch_size",
        batch_size,
        f"a multiple of compute.trainer_workers = {compute.trainer_workers}",
        "Change one of them.",
    )
    return batch_size // compute.trainer_workers


def training_attention(base: BaseConfig) -> str | None:
    """The attention to train with, as `load_backbone` takes it.

    PyTorch's fused attention has no fast backward pass in bfloat16 on CPU: four times as long as
    plain products (16 rows of 92 tokens on 129, 9 heads of 64 on 3: 29 ms against 7).
    """
    on_gpu = base.device != "cpu" and torch.cuda.is_available()
    return register_grouped() if computes_in_bf16(base) and not on_gpu else None


def autocast_forward(model: nn.Module, base: BaseConfig) -> nn.Module:
    """Let `model.forward` compute matrix products in bfloat16 where that is fast; weights and
    gradients stay as they are.

    Inside the forward, because DeepSpeed turns an autocast around it off; and not by the trainer's
    `bf16`, with which DeepSpeed would hold the adapter itself in bfloat16.
    """
    if computes_in_bf16(base):
        device = next(model.parameters()).device.type
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model


def deepspeed_config(compute: ComputeConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration for `TrainingArguments(deepspeed=...)`; None trains without it. On
    CPU nothing is compiled."""
    if compute.zero_stage == 0:
        return None
    if not compute.trainer_gpus:
        _skip_shared_memory_collectives()
    zero: dict[str, Any] = {
        "stage": compute.zero_stage,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        "overlap_comm": bool(compute.trainer_gpus),
    }
    if compute.zero_stage == 3:
        # The library gathers what is below the threshold into buffers of ONE type; base and adapter
        # have two.
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _skip_shared_memory_collectives() -> None:
    """Spare CPU workers an op that DeepSpeed would compile when it starts: its inference calls it,
    its training never does.

    It needs a C++ compiler and half a minute on first use, and a build that is killed leaves a lock
    for which every later run would wait without end.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make parameters that ZeRO-3 has spread over the workers whole for the length of a with-block;
    all ranks must enter."""
    parameters = list(parameters)
    spread = any(hasattr(parameter, "ds_id") for parameter in parameters)
    if not spread:
        context = nullcontext()
    else:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(parameters)
    with context:
        yield


def checkpoint_trainable_only(model: nn.Module) -> None:
    """Leave a module's frozen parameters out of its `state_dict`, and do not miss them when one is
    loaded."""
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }

    def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    def forgive(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [
            key for key in incompatible.missing_keys if key not in frozen
        ]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(forgive)
