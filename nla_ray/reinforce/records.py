"""What is written down of a step of GRPO, and what a reading of the monitor decides.

A record of metrics a step, a record a reading, both as a line of the log; and the checkpoint that a
reading offers. Knows no TRL class, no loss and no rollout. Protects the rule that the judge
chooses the checkpoint that is published.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from nla_ray.base.adapters import save_adapter
from nla_ray.reinforce.monitor import (
    JUDGE_COSINE,
    JUDGE_GAIN,
    KEPT,
    PREFIX,
    REWARDED,
    WARNED,
    Monitor,
    best_reading,
    hacking_warning,
    kept_reading,
)
from nla_ray.reinforce.rollouts import PublishedWeights, WeightPublisher
from nla_ray.reinforce.steps import StepClock
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.settings.config import GRPOSettings
from nla_ray.training.callbacks import StageCallback
from nla_ray.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from transformers import Trainer

logger = get_logger(__name__)


SECONDS = "seconds/"
"""What the names of timings begin with, in records of steps and of readings."""
_JUDGED_NAME = "judged.json"
"""Step -> the judge's centred cosine of every activation; beside the metrics until the stage ends:
a run that goes on compares its readings with those before."""
_WAITED = ("publication", "rollout", "score", "log_prob")
"""Parts of a step that the clock measures; the update is what is left."""


class GRPOCallback(StageCallback):
    """Records every step and every reading of the monitor, and offers checkpoints.

    `tells_steps`: whether every step is a line of the log too; the driver may draw steps instead.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: GRPOSettings,
        trainer: Trainer,
        publisher: WeightPublisher,
        monitor: Monitor,
        clock: StepClock,
        *,
        tells_steps: bool,
    ) -> None:
        super().__init__(checkpoints, settings.artifact)
        self._tells_steps = tells_steps
        self.settings, self.trainer, self.publisher = settings, trainer, publisher
        self.monitor, self.clock = monitor, clock
        self._readings = [record for record in self._log.read() if JUDGE_COSINE in record]
        self._judged_file = Location.of(checkpoints.folder / _JUDGED_NAME)
        self._judged: dict[str, list[float]] = {}
        if self._judged_file.exists():
            self._judged = json.loads(self._judged_file.read_text())
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first reading is of the SFT verbalizer."""
        if state.global_step == 0:
            self._watch(0, {})

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        seconds = self.clock.take()
        whole = time.perf_counter() - self._started
        waited = sum(seconds.get(name, 0.0) for name in _WAITED)
        seconds |= {
            "step": whole,
            "update": whole - waited,
            "rollout_idle": whole - seconds.get("rollout_busy", 0.0),
        }
        self._seconds = {SECONDS + name: value for name, value in sorted(seconds.items())}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Comes after every step, on every rank, and before the checkpoint of that step."""
        if not logs or "loss" not in logs:
            return
        record = {
            "step": state.global_step,
            **{key: float(value) for key, value in logs.items() if value is not None},
            **self._seconds,
        }
        if self.checkpoints.is_writer:
            self.record(record)
            if self._tells_steps:
                logger.info(step_line(record, state.max_steps))
        # The last step is always read: it may be the best.
        is_last = state.global_step == state.max_steps
        if is_last or state.global_step % self.settings.monitor_steps == 0:
            self._watch(state.global_step, record)

    def _watch(self, step: int, record: Mapping[str, float]) -> None:
        """Take a reading, record it, and offer the adapter.

        All ranks publish, which gathers the adapter's weights; one rank asks the actors.
        """
        started = time.perf_counter()
        weights = self.publisher.publish(self.trainer.model, step)
        is_writer = self.checkpoints.is_writer
        reading = self._read(step, weights, record, started) if is_writer else None
        [reading] = broadcast_object_list([reading])
        if reading[KEPT]:
            self._offer(step, reading)

    def _read(
        self, step: int, weights: PublishedWeights, record: Mapping[str, float], started: float
    ) -> dict[str, float]:
        """The monitor's reading, with how far the policy has moved by the record of the step."""
        figures, judged = self.monitor.read(weights)
        reading = {"step": step, **figures, SECONDS + "monitor": time.perf_counter() - started}
        for name in ("kl", "sampler_gap/k3"):
            if name in record:
                reading[PREFIX + name.rpartition("/")[2]] = record[name]
        best, warning = best_reading(self._readings), None
        if best is not None:
            reading |= self.monitor.gain(judged, torch.tensor(self._judged[str(best["step"])]))
            warning = hacking_warning(reading, best)
        reading[WARNED] = float(warning is not None)
        self._readings.append(reading)
        reading[KEPT] = float(self._is_kept(reading))
        self._judged[str(step)] = judged.tolist()
        self._judged_file.write_text(json.dumps(self._judged))
        self.record(reading)
        logger.info(reading_line(reading))
        if warning:
            logger.warning(warning)
        return reading

    def _is_kept(self, reading: Mapping[str, float]) -> bool:
        """Whether the checkpoint of the newest reading is to be published.

        The judge chooses. The ablation shows where its reward leads, so it keeps its last step.
        """
        if self.settings.contrast == "none":
            return reading["step"] > 0
        return kept_reading(self._readings) is reading

    def _offer(self, step: int, reading: dict[str, float]) -> None:
        """Offer the adapter as the one to be published: the newest offer wins."""
        parameters = self.trainer.model.parameters()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.checkpoints.offer(
            step,
            -float(step),
            lambda folder: save_adapter(self.trainer.model, folder / "adapter"),
            parameters=trained,
            metrics=reading,
        )


def step_line(record: Mapping[str, float], steps: int) -> str:
    """One step in one line: what was earned, how far the policy moved, where the seconds went."""
    shares = " ".join(
        f"{name} {record.get(f'rewards/{name}/mean', 0.0):.2f}"
        for name in ("unclosed", "repeated", "evidence")
    )
    spent = " ".join(
        f"{name} {record.get(SECONDS + name, 0.0):.2f}"
        for name in ("publication", "rollout", "log_prob", "score", "update")
    )
    return (
        f"grpo: step {record['step']:.0f} of {steps}, reward {record['reward']:.3f}, score"
        f" {record['rewards/score/mean']:.3f}, {shares}, tokens"
        f" {record['completions/mean_length']:.1f}, kl {record.get('kl', 0.0):.4f}, gap"
        f" {record['sampler_gap/mean']:.1e}, {record[SECONDS + 'step']:.2f} s ({spent})"
    )


def reading_line(reading: Mapping[str, float]) -> str:
    """One reading of the monitor in one line."""
    cosine, top1 = (_interval(reading, name) for name in (JUDGE_COSINE, PREFIX + "judge_top1"))
    gain = f", {_interval(reading, JUDGE_GAIN)} above the best" if JUDGE_GAIN in reading else ""
    named_shares = {
        "claims found": "claim_precision",
        "distinct": "distinct_share",
        "unclosed": "unclosed_share",
        "repeating": "repeating_share",
    }
    shares = ", ".join(
        f"{word} {reading[PREFIX + name]:.2f}" for word, name in named_shares.items()
    )
    return (
        f"grpo: validation at step {reading['step']:.0f}: judge centred cosine {cosine}{gain},"
        f" judge top-1 {top1}, rewarded {reading[REWARDED]:.3f}, {shares}, tokens"
        f" {reading[PREFIX + 'mean_tokens']:.1f}, {reading[SECONDS + 'monitor']:.2f} s"
        f"{', kept' if reading[KEPT] else ''}"
    )


def _interval(reading: Mapping[str, float], name: str) -> str:
    value, low, high = (reading[name + end] for end in ("", "_low", "_high"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def monitor_share(
    steps: Sequence[Mapping[str, float]], readings: Sequence[Mapping[str, float]]
) -> float:
    """Seconds of the monitor's readings over seconds of the steps; 0.0 before the first step.

    The reading before the first step is left out: it waits for the actors to start.
    """
    if not steps:
        return 0.0
    read = sum(reading[SECONDS + "monitor"] for reading in readings if reading["step"] > 0)
    return read / sum(record[SECONDS + "step"] for record in steps)
