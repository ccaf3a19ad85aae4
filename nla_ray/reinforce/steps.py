"""One step of GRPO as TRL calls it: its rollouts, their scores and rewards, and what they cost.

`StepSampler` is TRL's `rollout_func` and its reward functions. Knows no TRL class and no loss: it
turns the rows of a batch into requests to actors, and their answers into columns. Protects the rule
that every group is sampled with the adapter of its step, and scored while the trainer works on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from nla_ray.base.prompts import InjectionPrompt
from nla_ray.cluster.actors import ActorPool, SharedArray
from nla_ray.description.record import Description
from nla_ray.reinforce.claim_credit import ClaimPrices, claim_values
from nla_ray.reinforce.credit import Lines, cut_lines, line_values
from nla_ray.reinforce.differences import WrongRows
from nla_ray.reinforce.monitor import MonitorData
from nla_ray.reinforce.rewards import (
    SCORE,
    TEXT_TERMS,
    WrongActivations,
    beginning_worth,
    reward_weights,
    score_term,
    text_terms,
)
from nla_ray.reinforce.rollouts import WeightPublisher, generate, group_rows, train_request
from nla_ray.reinforce.scoring import ScoreBatch, ScoringRequest, submit_scores
from nla_ray.settings.config import GRPOSettings

if TYPE_CHECKING:
    from ray import ObjectRef
    from transformers import Trainer


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the trainer's workers get from the driver. Vectors stay in the object store."""

    schedule: list[list[int]]
    """Rows of the train bank, one list for each batch of rollouts."""
    sources: dict[int, str]
    """Source text of every scheduled row; of a difference that of its first activation."""
    without: dict[int, str] = field(default_factory=dict)
    """Of every scheduled difference the text of its second activation."""
    wrong: WrongActivations | WrongRows | None
    """Draws what the descriptions of a row must not fit; None in the arm without contrast."""
    bank: SharedArray
    """What is injected for each train activation, float32: the activations [rows, d_model], or
    [rows, vectors, d_model]."""
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
    """TRL's `rollout_func`, and the reward functions that read what it sampled last."""

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
        self.settings, self.data, self.clock = settings, data, clock
        self.prompt, self.vocab_size = prompt, vocab_size
        self.publisher = WeightPublisher()
        self._rollouts, self._scorers = rollouts, scorers
        self._scoring: list[ObjectRef] = []
        self._lines: list[Lines] = []
        """Of every rollout; empty where credit goes to whole descriptions."""
        priced = data.sources.values() if settings.claim_weight else ()
        self._prices = ClaimPrices.of(priced, settings.claim_precision)
        self._claims: list[list[float]] = []
        """Of every rollout the value of each token's claim; empty where claims are not paid."""
        self._worths: list[list[float]] = []
        """What the beginnings and the whole of every rollout earn beside their scores."""
        self._scores: list[float] = []
        """Of all rollouts, and behind them of all beginnings, rollout after rollout."""

    def __call__(self, prompts: list[str], trainer: Trainer) -> dict[str, list]:
        """Rollouts of this process's groups under this step's adapter; leaves scoring running."""
        step, accelerator = trainer.state.global_step, trainer.accelerator
        part = accelerator.process_index, accelerator.num_processes
        groups = group_rows([int(prompt) for prompt in prompts], self.settings.group_size)
        with self.clock.measure("publication"):
            weights = self.publisher.publish(trainer.model, step)
        with self.clock.measure("rollout"):
            request = train_request(self.settings, groups, step)
            batch = generate(self._rollouts.part(*part), request, weights)
        self.clock.add("rollout_busy", batch.generate_seconds)
        decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
        if self.settings.credit == "line":
            self._lines = [cut_lines(rollout.token_ids, decode) for rollout in batch.rollouts]
        request = self._scoring_request(batch.rollouts, step)
        self._scoring = submit_scores(self._scorers.part(*part), request)
        columns = self._columns(batch.rollouts)
        if self.settings.claim_weight:  # while the scorers work
            self._claims = [
                claim_values(
                    rollout.token_ids,
                    decode,
                    self.data.sources[rollout.row],
                    self._prices,
                    self.data.without.get(rollout.row, ""),
                )
                for rollout in batch.rollouts
            ]
        if self.settings.credit == "line":
            self._worths = self._worths_of(batch.rollouts, columns)
        return columns

    def _worths_of(
        self, rollouts: Sequence[Description], columns: Mapping[str, list]
    ) -> list[list[float]]:
        weights, worths = reward_weights(self.settings), []
        for index, (rollout, lines) in enumerate(zip(rollouts, self._lines, strict=True)):
            source = self.data.sources[rollout.row]
            without = self.data.without.get(rollout.row, "")
            begun = [
                beginning_worth(text, source, self.settings, without) for text in lines.beginnings
            ]
            whole = sum(weights[name] * columns[name][index] for name in TEXT_TERMS)
            worths.append([*begun, whole])
        return worths

    def _scoring_request(self, rollouts: Sequence[Description], step: int) -> ScoringRequest:
        """The descriptions and, behind them, the beginnings that credit is shared out by.

        All that is about a row is compared with the same wrong rows.
        """
        texts = [rollout.text for rollout in rollouts]
        rows = [rollout.row for rollout in rollouts]
        # Not strict: where credit goes to whole descriptions there are no lines at all.
        for rollout, lines in zip(rollouts, self._lines, strict=False):
            texts += lines.beginnings
            rows += [rollout.row] * len(lines.beginnings)
        draws = self.data.wrong
        wrong_of_row = {
            row: draws.draw(row, self.settings.seed, step) if draws else [] for row in set(rows)
        }
        return ScoringRequest(
            descriptions=texts, rows=rows, wrong_rows=[wrong_of_row[row] for row in rows]
        )

    def _columns(self, rollouts: Sequence[Description]) -> dict[str, list]:
        """What TRL asks for, and columns for the reward functions."""
        terms = [
            text_terms(
                rollout.written,
                rollout.num_sampled,
                self.data.sources[rollout.row],
                self.settings.soft_max_tokens,
                self.data.without.get(rollout.row, ""),
            )
            for rollout in rollouts
        ]
        prompts = [self.prompt.encode(rollout.row, self.vocab_size) for rollout in rollouts]
        return {
            "prompt_ids": prompts,
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.log_probs for rollout in rollouts],
            "text": [rollout.written for rollout in rollouts],
            "weight_version": [rollout.weight_version for rollout in rollouts],
            **{name: [values[name] for values in terms] for name in TEXT_TERMS},
        }

    def reward_function(self, name: str) -> Callable[..., list[float]]:
        """The reward term `name` as TRL calls it; TRL logs it under the function's name."""

        def term(**columns: Any) -> list[float]:
            return self._score(columns["log_metric"]) if name == SCORE else columns[name]

        term.__name__ = name
        return term

    def _score(self, log_metric: Callable[[str, float], None]) -> list[float]:
        """The score term of the rollouts sampled last, once the scorers have answered."""
        with self.clock.measure("score"):
            scores = ScoreBatch.join(self._scorers.collect(self._scoring))
        self.clock.add("score_busy", scores.seconds)
        values = score_term(
            self.settings,
            right=scores.right,
            wrong=scores.wrong,
            centred_right=scores.centred_right,
            centred_wrong=scores.centred_wrong,
        )
        whole = len(values) - sum(len(lines.beginnings) for lines in self._lines)
        self._scores = values.tolist()
        log_metric("score/right", scores.right[:whole].mean().item())
        log_metric("score/centred_right", scores.centred_right[:whole].mean().item())
        if self.settings.contrast == "wrong":
            log_metric("score/centred_wrong", scores.centred_wrong[:whole].mean().item())
        return self._scores[:whole]

    def rewards_by_line(self) -> list[list[float]]:
        """Of the rollouts scored last: the reward of the first line, of the first two, ... of all.

        Where credit goes to whole descriptions there are none.
        """
        whole, begun = iter(self._scores), iter(self._scores[len(self._worths) :])
        rewards = []
        for worths in self._worths:
            scores = [*(next(begun) for _ in worths[:-1]), next(whole)]
            rewards.append([score + worth for score, worth in zip(scores, worths, strict=True)])
        return rewards

    def claim_values(self) -> list[list[float]]:
        """Of the rollouts sampled last: for every token the value of its claim."""
        return self._claims

    def line_of_token(self) -> list[list[int]]:
        """Of the rollouts sampled last: for every token the index of its line."""
        return [lines.line_of_token for lines in self._lines]


def values_of_all_workers(
    advantages: Tensor,
    rewards: Sequence[Sequence[float]],
    group_size: int,
    *,
    scaled_by_group: bool,
) -> list[Tensor]:
    """`credit.line_values` of all workers' descriptions, one worker's behind the other's.

    Each gives those of its own. What is fitted is fitted to the whole batch, so values do not
    depend on how many workers share it.
    """
    return line_values(
        torch.tensor(gather_object(advantages.tolist())),
        gather_object(list(rewards)),
        group_size,
        scaled_by_group=scaled_by_group,
    )
