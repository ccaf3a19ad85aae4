"""What every trainer does beside its steps: metrics, progress lines, old checkpoints, seeds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback, TrainerCallback

from nla_ray.cpu import door
from nla_ray.cpu.memory import give_back_free_memory
from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from transformers import Trainer

logger = get_logger(__name__)


_LINE_SECONDS = 10.0
_TRIM_STEPS = 20
"""On a CPU: batches of many lengths leave holes in a heap that gives nothing back by itself (see
`cpu.environment`)."""


class StageCallback(TrainerCallback):
    """What a trainer tells while it runs.

    It writes the logs to the metrics file and the trackers, tells progress every ten seconds,
    drops what a checkpoint supersedes, and draws anew at every step.
    """

    def __init__(self, checkpoints: Checkpoints, title: str) -> None:
        self.checkpoints, self.title = checkpoints, title
        self._log, self._trackers = checkpoints.metrics_log(), checkpoints.trackers()
        self._last_line = time.monotonic()

    def record(self, metrics: dict[str, float]) -> None:
        """Write one record of metrics, with its `step`, and show it in the trackers."""
        self._log.append(metrics)
        self._trackers.write(metrics)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Record the trainer's logs; tell the loss."""
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

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Draw (dropout, the order inside a step) by seed, step and rank.

        So a run that goes on draws as one that was never cut off, and no state is kept for it.
        """
        step, rank = str(state.global_step), str(args.process_index)
        torch.manual_seed(seed_of(args.seed, "step", step, rank))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Keep the heap small."""
        if state.global_step % _TRIM_STEPS == 0 and door.is_for_device(args.device):
            give_back_free_memory()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Tell the validation figures."""
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
        """Drop the checkpoint before the one that was just written; on a remote run, upload."""
        self.checkpoints.drop_superseded()
        self.checkpoints.upload()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Close the trackers."""
        self._trackers.close()


def follow(trainer: Trainer, checkpoints: Checkpoints, title: str) -> None:
    """Give a trainer the stage's callback in place of the library's printing."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageCallback(checkpoints, title))
