"""The scratch folder of a training stage: checkpoints, metrics, and the best files so far.

Protects three rules: a stage that is cut off anywhere goes on from its newest complete checkpoint;
the best evaluation is what is published; nothing that is superseded stays, here or in a store.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from nla_ray.run.artifact import Run
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.metrics import METRICS_NAME, MetricsLog
from nla_ray.settings.config import RunConfig
from nla_ray.training.trackers import Trackers
from nla_ray.training.zero import gathered

logger = get_logger(__name__)


TRAINED_NAME = "trained.safetensors"
"""File inside a checkpoint, written last and whole: a checkpoint without it is torn and ignored."""
BEST_NAME = "best.json"
_RAY_PREFIX = "ray/"
"""What Ray Train keeps in a stage's scratch folder for itself."""


# Checkpoints --------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"checkpoint-{step}"


def last_checkpoint(folder: Path | str) -> Path | None:
    """The newest complete `checkpoint-N` in a folder, by N; None when there is none."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{TRAINED_NAME}")]
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class Checkpoints:
    """The scratch folder of one training stage, as a worker sees it; a context manager.

    It holds a checkpoint, metrics.jsonl and the best files so far, all written by the first rank.
    On a local run it is the run's own folder. On a remote one it is a temporary folder, which is
    filled from the run at the start and removed at the end. The first rank keeps the run's files
    those of its folder; the others take what they resume from, and write nothing.
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
        record = self.folder / BEST_NAME
        self.best: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
        """Step, value and metrics of the best offer so far; empty before the first."""
        self.drop_superseded()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Upload what is left, unless an error ends the stage; leave no temporary folder."""
        if kind is None:
            self.upload()
        if not self.location.is_local:
            shutil.rmtree(self.folder, ignore_errors=True)

    def last(self) -> str | None:
        """The checkpoint that `Trainer.train(resume_from_checkpoint=...)` is to resume from."""
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
        """Where the stage's metrics are shown besides, cut back alike.

        A process that does not write metrics shows nothing.
        """
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
        """Keep what `save(folder)` writes when `value` (lower is better) beats every earlier offer.

        Says whether it did. All ranks call it; the first one decides, because values may differ in
        the last bit, and saves, while `parameters` are gathered. The artifact is made from the best
        offer: a kill at any moment leaves the one before or the new one, whole.
        """
        if not _as_first_rank_says(value < self.best.get("value", float("inf"))):
            return False
        # A name of its own: a resumed run may offer a step again, whose folder the record names
        # until the new one is whole.
        folder = self.folder / f"best-{step}-{uuid.uuid4().hex[:8]}"
        with gathered(parameters):
            if self.is_writer:
                folder.mkdir()
                save(folder)
        self.best = {"step": step, "value": value, "folder": folder.name, "metrics": metrics or {}}
        if self.is_writer:
            Location.of(self.folder / BEST_NAME).write_text(json.dumps(self.best))
        self.drop_superseded()
        return True

    def drop_superseded(self) -> None:
        """Remove every checkpoint but the newest, what is torn, and every offer but the best."""
        if not self.is_writer:
            return
        kept = {last_checkpoint(self.folder), self.folder / self.best.get("folder", BEST_NAME)}
        for pattern in ("checkpoint-*", "best-*"):
            for path in set(self.folder.glob(pattern)) - kept:
                shutil.rmtree(path, ignore_errors=True)

    def upload(self) -> None:
        """On a remote run, from the first rank: make the run's files those of this folder.

        New and changed files are copied, and what was removed here is removed there.
        """
        if self.location.is_local or not self.is_writer:
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
        """The first rank takes everything; the others the newest checkpoint and the best record."""
        names = [name for name in self.location.list_files() if not name.startswith(_RAY_PREFIX)]
        if not self.is_writer:
            complete = [Path(name).parent for name in names if name.endswith(f"/{TRAINED_NAME}")]
            newest = max(complete, key=_step_of, default=None)
            names = [name for name in names if name == BEST_NAME or Path(name).parent == newest]
        for name in names:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.location / name).read_bytes())
            status = target.stat()
            self._uploaded[name] = (status.st_size, status.st_mtime_ns)


def _declares(name: str) -> bool:
    """Whether a file says that others are whole: written after them, removed before them."""
    return name.endswith(f"/{TRAINED_NAME}") or name == BEST_NAME


def _as_first_rank_says(decision: bool) -> bool:
    """The first rank's decision, on every rank: where ranks part, those that wait wait for ever."""
    decisions = [decision]
    if _has_other_ranks():
        torch.distributed.broadcast_object_list(decisions, src=0)
    return decisions[0]


def _has_other_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
