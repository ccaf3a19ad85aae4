"""One step of GRPO as seen from outside TRL: its rollouts and rewards, what it cost, and what is
told about it.

`StepSampler` is the `rollout_func` and the reward functions that TRL calls; `GRPOCallback` writes
one log line and one record of metrics a step, asks the monitor, and offers checkpoints. Knows no
TRL class and no loss.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from nla_ray.base.adapters import save_adapter
from nla_ray.base.prompts import InjectionPrompt
from nla_ray.cluster.actors import ActorPool, SharedArray
from nla_ray.description.record import Description
from nla_ray.reinforce.credit import Lines, cut_lines, share_out
from nla_ray.reinforce.monitor import (
    JUDGE_COSINE,
    PREFIX,
    REWARDED,
    WARNED,
    Monitor,
    MonitorData,
    best_reading,
    hacking_warning,
)
from nla_ray.reinforce.rewards import (
    SCORE,
    TEXT_TERMS,
    WrongActivations,
    beginning_worth,
    contrast,
    text_terms,
)
from nla_ray.reinforce.rollouts import (
    PublishedWeights,
    WeightPublisher,
    generate,
    group_rows,
    train_request,
)
from nla_ray.reinforce.scoring import ScoreBatch, ScoreRequest, submit_scores
from nla_ray.run.log import get_logger
from nla_ray.settings.config import GRPOSettings
from nla_ray.training.callbacks import StageCallback
from nla_ray.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from ray import ObjectRef
    from torch import Tensor
    from transformers import Trainer

logger = get_logger(__name__)


SECONDS = "seconds/"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the trainer's workers get from the driver. Vectors stay in the object store."""

    schedule: list[list[int]]
    """Rows of the train bank, one list for each batch of rollouts."""
    sources: dict[int, str]
    """Source text of every scheduled row."""
    wrong: WrongActivations | None
    """Draws what the descriptions of a row must not fit; None in the arm without contrast."""
    bank: SharedArray
    """[rows, d_model] float32, the train activations."""
    monitor: MonitorData


class StepClock:
    """Seconds of one training step by what they were spent on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the length of a with-block to `name`."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """What has been measured since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


class StepSampler:
    """TRL's `rollout_func`, and the reward functions that read what it found out."""

    def __init__(
        self,
        settings: GRPOSettings,
        data: TrainingData,
        prompt: InjectionPrompt,
        vocab_size: int,
        rollouts: ActorPool,
        scorers: ActorPool,
        clock: StepClock,
    ) -> None:
        self.settings, self.data, self.prompt, self.vocab_size, self.clock = (
            settings,
            data,
            prompt,
            vocab_size,
            clock,
        )
        self.publisher = WeightPublisher()
        self._rollouts, self._scorers = rollouts, scorers
        self._scoring: list[ObjectRef] = []
        self._lines: list[Lines] = []
        self._worths: list[list[float]] = []
        self._beginnings: list[float] = []

    def __call__(self, prompts: list[str], trainer: Trainer) -> dict[str, list]:
        """Rollouts of this process's groups under the adapter of this step; their scoring is left
        running."""
        step, rank, ranks = (
            trainer.state.global_step,
            trainer.accelerator.process_index,
            trainer.accelerator.num_processes,
        )
        groups = group_rows([int(prompt) for prompt in prompts], self.settings.group_size)
        with self.clock.measure("publication"):
            weights = self.publisher.publish(trainer.model, step)
        with self.clock.measure("rollout"):
            batch = generate(
                self._rollouts.part(rank, ranks),
                train_request(self.settings, groups, step),
                weights,
            )
        self.clock.add("rollout_busy", batch.generate_seconds)
        if self.settings.credit == "line":
            decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
            self._lines = [cut_lines(rollout.token_ids, decode) for rollout in batch.rollouts]
            self._worths = [
                [
                    beginning_worth(text, self.data.sources[rollout.row], self.settings)
                    for text in lines.beginnings
                ]
                for rollout, lines in zip(batch.rollouts, self._lines, strict=True)
            ]
        self._scoring = submit_scores(
            self._scorers.part(rank, ranks), self._score_request(batch.rollouts, step)
        )
        return self._fields(batch.rollouts)

    def _score_request(self, rollouts: Sequence[Description], step: int) -> ScoreRequest:
        """The descriptions, and behind them the beginnings that credit is shared out by, with the
        same wrong rows."""
        wrong = {
            row: self.data.wrong.draw(row, self.settings.seed, step) if self.data.wrong else []
            for row in {rollout.row for rollout in rollouts}
        }
        read = [(rollout.text, rollout.row) for rollout in rollouts]
        read += [
            (text, rollout.row)
            for rollout, lines in zip(rollouts, self._lines)
            for text in lines.beginnings
        ]
        return ScoreRequest(
            descriptions=[text for text, _ in read],
            rows=[row for _, row in read],
            wrong_rows=[wrong[row] for _, row in read],
        )

    def _fields(self, rollouts: Sequence[Description]) -> dict[str, list]:
        """What TRL wants back, and columns for the reward functions."""
        terms = [
            text_terms(
                rollout.written,
                rollout.num_sampled,
                self.data.sources[rollout.row],
                self.settings.soft_max_tokens,
            )
            for rollout in rollouts
        ]
        return {
            "prompt_ids": [
                self.prompt.encode(rollout.row, self.vocab_size) for rollout in rollouts
            ],
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.log_probs for rollout in rollouts],
            "text": [rollout.written for rollout in rollouts],
            "weight_version": [rollout.weight_version for rollout in rollouts],
            **{name: [one[name] for one in terms] for name in TEXT_TERMS},
        }

    def reward_function(self, name: str) -> Callable[..., list[float]]:
        """The reward term `name` as TRL calls it; TRL logs it under the function's name."""

        def term(**columns: Any) -> list[float]:
            return self._score(columns["log_metric"]) if name == SCORE else columns[name]

        term.__name__ = name
        return term

    def _score(self, log_metric: Callable[[str, float], None]) -> list[float]:
        with self.clock.measure("score"):
            scores = ScoreBatch.join(self._scorers.collect(self._scoring))
        self.clock.add("score_busy", scores.seconds)
        values = self._rewarded(scores)
        whole = len(values) - sum(len(lines.beginnings) for lines in self._lines)
        self._beginnings = values[whole:].tolist()
        log_metric("score/right", scores.right[:whole].mean().item())
        log_metric("score/centred_right", scores.centred_right[:whole].mean().item())
        if self.settings.contrast == "wrong":
            log_metric("score/centred_wrong", scores.centred_wrong[:whole].mean().item())
        return values[:whole].tolist()

    def _rewarded(self, scores: ScoreBatch) -> Tensor:
        if self.settings.contrast == "none":
            return scores.right
        return (
            contrast(scores.centred_right, scores.centred_wrong)
            if self.settings.centred
            else contrast(scores.right, scores.wrong)
        )

    def share_out(self, advantages: Tensor, length: int) -> tuple[Tensor, float]:
        """`credit.share_out` of the rollouts scored last: [n] -> [n, length]."""
        scores = iter(self._beginnings)
        rewards = [[next(scores) + worth for worth in own] for own in self._worths]
        return share_out(
            advantages,
            rewards,
            [lines.line_of_token for lines in self._lines],
            self.settings.group_size,
            length,
        )


class GRPOCallback(StageCallback):
    """One record of metrics a step, and a line unless the driver shows it; the monitor's readings;
    the checkpoint to be published."""

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
        self.settings, self.trainer, self.publisher, self.monitor, self.clock = (
            settings,
            trainer,
            publisher,
            monitor,
            clock,
        )
        self._readings = [record for record in self._log.read() if JUDGE_COSINE in record]
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self._watch(0, {})

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control, **kwargs)
        seconds = self.clock.take()
        whole = time.perf_counter() - self._started
        waited = sum(
            seconds.get(name, 0.0) for name in ("publication", "rollout", "score", "log_prob")
        )
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
        # The last step's reading is taken whatever its number: it may be the best.
        if (
            state.global_step % self.settings.monitor_steps == 0
            or state.global_step == state.max_steps
        ):
            self._watch(state.global_step, record)

    def _watch(self, step: int, record: Mapping[str, float]) -> None:
        """Take a reading, tell it, and offer the adapter. All ranks publish, which gathers its
        weights; one asks the actors."""
        started = time.perf_counter()
        weights = self.publisher.publish(self.trainer.model, step)
        shared = [
            self._read(step, weights, record, started) if self.checkpoints.is_writer else None
        ]
        [reading] = broadcast_object_list(shared)
        self._readings.append(reading)
        if step > 0:
            self._offer(step, reading)

    def _read(
        self, step: int, weights: PublishedWeights, record: Mapping[str, float], started: float
    ) -> dict[str, float]:
        reading = {
            "step": step,
            **self.monitor.read(weights),
            SECONDS + "monitor": time.perf_counter() - started,
            **{
                PREFIX + name.rpartition("/")[2]: record[name]
                for name in ("kl", "sampler_gap/k3")
                if name in record
            },
        }
        best = best_reading(self._readings)
        warning = hacking_warning(reading, best) if best else None
        reading[WARNED] = float(warning is not None)
        self.record(reading)
        logger.info(reading_line(reading))
        if warning:
            logger.warning(warning)
        return reading

    def _offer(self, step: int, reading: dict[str, float]) -> None:
        """The judge chooses what is published; the ablation is there to show where its reward
        leads, so it keeps its last."""
        value = -reading[JUDGE_COSINE] if self.settings.contrast == "wrong" else -float(step)
        trained = [
            parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad
        ]
        self.checkpoints.offer(
            step,
            value,
            lambda folder: save_adapter(self.trainer.model, folder / "adapter"),
            parameters=trained,
            metrics=reading,
        )


def step_line(record: Mapping[str, float], steps: int) -> str:
    """One step in one line: what was earned, how far the policy has moved, and where the seconds
    went."""
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

    def figure(name: str) -> str:
        return (
            f"{reading[PREFIX + name]:.3f} [{reading[f'{PREFIX}{name}_low']:.3f},"
            f" {reading[f'{PREFIX}{name}_high']:.3f}]"
        )

    return (
        f"grpo: validation at step {reading['step']:.0f}: judge centred cosine"
        f" {figure('judge_centred_cosine')}, judge top-1 {figure('judge_top1')}, rewarded"
        f" {reading[REWARDED]:.3f}, claims found {reading[PREFIX + 'claim_precision']:.2f},"
        f" distinct {reading[PREFIX + 'distinct_share']:.2f}, unclosed"
        f" {reading[PREFIX + 'unclosed_share']:.2f}, repeating"
        f" {reading[PREFIX + 'repeating_share']:.2f}, tokens {reading[PREFIX + 'mean_tokens']:.1f},"
        f" {reading[SECONDS + 'monitor']:.2f} s"
    )


def monitor_share(
    steps: Sequence[Mapping[str, float]], readings: Sequence[Mapping[str, float]]
) -> float:
    """Seconds of the monitor's readings over seconds of the steps; 0.0 before the first step.

    The reading before the first step is left out: it waits for the actors to start.
    """
    stepped = sum(record[SECONDS + "step"] for record in steps)
    return (
        sum(reading[SECONDS + "monitor"] for reading in readings if reading["step"] > 0) / stepped
        if steps
        else 0.0
    )
