"""The figures of a training stage in TensorBoard and in Weights & Biases, by accelerate's trackers.

Every record of metrics.jsonl is shown under the same names, in W&B only where the environment asks
for it; neither package has to be installed. Knows no stage. Protects two rules: a resumed run shows
no step twice, and a tracker that fails costs the run one line, nothing else. (The trainer's own
`report_to` could not keep them: its W&B callback counts steps anew after a resume, both rename
figures, and neither sees the monitor's.)
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.settings.config import RunConfig, to_dict

_WANDB_ID_NAME = "wandb_id"
"""File in a stage's scratch folder: the W&B run that a resumed stage goes on with, until its
artifact is published."""
_WANDB_SECONDS = 30.0
"""How long W&B may take to start, and to send the rest in the end."""

logger = get_logger(__name__)


def wandb_is_wanted() -> bool:
    """Whether the environment asks for W&B: a key, or its offline mode.

    Nothing else may start it, or ask for a login.
    """
    return "WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") == "offline"


def is_installed(package: str) -> bool:
    """Whether a package can be imported.

    A folder of its name beside the job (W&B makes one) is none.
    """
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


class Trackers:
    """All trackers of one stage of a run: `write` takes a record of metrics.jsonl."""

    def __init__(self) -> None:
        self._open: dict[str, GeneralTracker] = {}

    @classmethod
    def of(cls, run_config: RunConfig, name: str, *, scratch: Path, first_step: int) -> Trackers:
        """The trackers of stage `name`, which goes on with `first_step`.

        What it showed from that step on before is hidden. TensorBoard's files lie in the run, in
        `tensorboard/`. `scratch`: the stage's folder.
        """
        trackers = cls()
        if is_installed("tensorboard"):
            folder = Run(run_config).root / "tensorboard"
            if folder.is_local:
                tracker = TensorBoardTracker(name, folder.path, purge_step=first_step)
                trackers._start("TensorBoard", tracker)
            else:
                logger.info("%s: no TensorBoard, which needs a local run directory", name)
        if wandb_is_wanted() and is_installed("wandb"):
            with trackers._tolerated("W&B"):
                trackers._start("W&B", _wandb_tracker(run_config, name, scratch))
        return trackers

    def _start(self, title: str, tracker: GeneralTracker) -> None:
        with self._tolerated(title):
            tracker.start()
            self._open[title] = tracker

    def write(self, record: Mapping[str, float]) -> None:
        """Show a record: its `step`, and all else as figures."""
        figures = {name: value for name, value in record.items() if name != "step"}
        for title, tracker in list(self._open.items()):
            with self._tolerated(title):
                tracker.log(figures, step=int(record["step"]))

    def close(self) -> None:
        """Nothing more will be written."""
        for title, tracker in list(self._open.items()):
            with self._tolerated(title):
                tracker.finish()

    @contextmanager
    def _tolerated(self, title: str) -> Iterator[None]:
        """Any error ends this tracker, with a line, and is over.

        What a tracker may raise is not ours to know.
        """
        try:
            yield
        except Exception as error:
            self._open.pop(title, None)
            reason = next(iter(str(error).splitlines()), "")
            logger.warning(
                "%s is left out: %s: %s. Every figure is in metrics.jsonl.",
                title,
                type(error).__name__,
                reason,
            )


def _wandb_tracker(run_config: RunConfig, name: str, scratch: Path) -> WandBTracker:
    """A W&B run of the stage, of which libraries that look for a current run know nothing.

    W&B drops steps that it has by itself.
    """
    import wandb

    root, run_id = Run(run_config).root, scratch / _WANDB_ID_NAME
    if not run_id.exists():
        run_id.write_text(uuid.uuid4().hex[:8])
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", "nla_ray"),
        name=f"{Path(root.path).name}/{name}",
        id=run_id.read_text(),
        resume="allow",
        reinit="create_new",
        dir=root.path if root.is_local else None,
        config=to_dict(run_config),
        settings=wandb.Settings(
            silent=True, console="off", init_timeout=_WANDB_SECONDS, finish_timeout=_WANDB_SECONDS
        ),
    )
