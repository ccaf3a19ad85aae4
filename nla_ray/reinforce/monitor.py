"""Watches for reward hacking while GRPO runs, on validation documents.

Every so many steps the verbalizer describes the same validation activations greedily, and both
scorers reconstruct them. The judge pays nothing. Two readings are of the same activations, so they
are compared pair by pair: what all activations have in common, which makes the interval of one
reading wide, drops out of the difference. Where the whole interval of the judge's difference to
its best reading is above 0, the best reading is this one; where it is below 0 while the reward
rose, the run says so and marks the step. Knows neither TRL nor the trainer; the figures are those
of `score/metrics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.cluster.actors import ActorPool
from nla_ray.description.record import Description
from nla_ray.reinforce.rewards import score_term
from nla_ray.reinforce.rollouts import PublishedWeights, RolloutRequest, generate
from nla_ray.reinforce.scoring import reconstruct
from nla_ray.score.bootstrap import FamilyBootstrap, Interval
from nla_ray.score.claims import claim_precision, repeats_item
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.metrics import Figure
from nla_ray.settings.config import GRPOSettings

PREFIX = "monitor/"
"""What the names of figures begin with in a reading."""
JUDGE_COSINE = PREFIX + "judge_centred_cosine"
JUDGE_GAIN = PREFIX + "judge_gain"
"""The judge's centred cosine less that of the best reading before; with its paired interval."""
REWARDED = PREFIX + "rewarded"
WARNED = PREFIX + "warned"
KEPT = PREFIX + "kept"
"""1 in a reading whose checkpoint is published unless a later one takes its place."""
_RESAMPLES = 2_000


@dataclass(frozen=True, kw_only=True)
class MonitorData:
    """The validation activations that are described again and again."""

    rows: list[int]
    """Rows of the validation bank."""
    comparisons: Comparisons
    """The activations, the train mean, and what each activation is compared with."""
    doc_ids: list[str]
    family_ids: list[str]
    texts: list[str]
    """The source text of each activation."""


class Monitor:
    """Takes readings: flat dictionaries of figures by name, ready for the metrics file."""

    def __init__(
        self, settings: GRPOSettings, data: MonitorData, rollouts: ActorPool, scorers: ActorPool
    ) -> None:
        self.settings, self.data = settings, data
        self._rollouts, self._scorers = rollouts, scorers
        self._comparisons = data.comparisons
        self._bootstrap = FamilyBootstrap(data.family_ids, resamples=_RESAMPLES, seed=settings.seed)

    def read(self, weights: PublishedWeights) -> tuple[dict[str, float], Tensor]:
        """Describe the validation activations, reconstruct twice, and sum up.

        The second value is the judge's centred cosine of every activation: [rows].
        """
        request = RolloutRequest(
            split="validation",
            rows=self.data.rows,
            group_size=1,
            temperature=0.0,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
        )
        written = generate(self._rollouts, request, weights).rollouts
        descriptions = [description.text for description in written]
        judged = reconstruct(self._scorers, "judge_scorer", descriptions)
        rewarded = reconstruct(self._scorers, "reward_scorer", descriptions)
        figures = self._geometry(judged, rewarded) | text_figures(written, self.data.texts)
        return figures, self._centred(judged)

    def gain(self, judged: Tensor, best: Tensor) -> dict[str, float]:
        """How far one reading's `judged` lies above the best one's, with its paired interval.

        Both as `read` gives them: [rows].
        """
        first, second = {JUDGE_GAIN: Figure.mean(judged)}, {JUDGE_GAIN: Figure.mean(best)}
        return _flat(self._bootstrap.differences(first, second))

    def _geometry(self, judged: Tensor, rewarded: Tensor) -> dict[str, float]:
        right = vectors.cosine(judged, self._comparisons.originals)
        figures = {
            JUDGE_COSINE: Figure.mean(self._centred(judged)),
            PREFIX + "judge_top1": Figure.mean(right > self._garbage(judged)),
            PREFIX + "reward_centred_cosine": Figure.mean(self._centred(rewarded)),
            REWARDED: Figure.mean(self._paid(rewarded)),
        }
        return _flat(self._bootstrap.intervals(figures))

    def _centred(self, reconstruction: Tensor) -> Tensor:
        return vectors.centred_cosine(
            reconstruction, self._comparisons.originals, self._comparisons.mean
        )

    def _garbage(self, reconstruction: Tensor) -> Tensor:
        return vectors.cosine(reconstruction, self._comparisons.pool[self._comparisons.wrong])

    def _paid(self, reconstruction: Tensor) -> Tensor:
        """What the score term would pay for these reconstructions: [rows]."""
        repeated = reconstruction.unsqueeze(1)
        wrong = self._comparisons.pool[self._comparisons.others]
        return score_term(
            self.settings,
            right=vectors.cosine(reconstruction, self._comparisons.originals),
            wrong=vectors.cosine(repeated, wrong),
            centred_right=self._centred(reconstruction),
            centred_wrong=vectors.centred_cosine(repeated, wrong, self._comparisons.mean),
        )


def _flat(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Every figure's value under its name, the ends of its interval beside it."""
    figures: dict[str, float] = {}
    for name, interval in intervals.items():
        figures |= {
            name: interval.value,
            f"{name}_low": interval.low,
            f"{name}_high": interval.high,
        }
    return figures


def text_figures(written: Sequence[Description], texts: Sequence[str]) -> dict[str, float]:
    """Shares of descriptions that are distinct, unclosed, repeating; claims found; mean length.

    `texts`: the source text of every description.
    """
    count = len(written)
    described = [description.text for description in written]
    precisions = [
        claim_precision(text, source) for text, source in zip(described, texts, strict=True)
    ]
    return {
        PREFIX + "distinct_share": len(set(described)) / count,
        PREFIX + "unclosed_share": sum(not description.closed for description in written) / count,
        PREFIX + "repeating_share": sum(repeats_item(text) for text in described) / count,
        PREFIX + "claim_precision": sum(precisions) / count,
        PREFIX + "mean_tokens": sum(description.num_sampled for description in written) / count,
    }


def best_reading(readings: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The judge's best reading; None of none.

    The first one is, until another is better by the whole interval of its gain. A higher figure
    alone is no reason: the highest of many equal readings is high by luck, and all the others would
    seem to have fallen.
    """
    best = next(iter(readings), None)
    for reading in readings[1:]:
        if reading[JUDGE_GAIN + "_low"] > 0:
            best = reading
    return best


def kept_reading(readings: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The reading whose checkpoint is to be published; None before the first step.

    That is the highest but for the first, which is of the SFT verbalizer; the earliest of equals.
    By paired differences no other is better, as their mean is the difference of the means, and none
    that has fallen from the best one is the highest. Their interval is no hurdle here: one of two
    checkpoints has to be published, and the higher is the better guess. With the hurdle two of
    three trainings (nano, 128 activations) published step 20 of 80, gains on SFT of .006 and .005
    of the judge's centred cosine on 557 activations; the third published step 80, a gain of .011.
    """
    return max(readings[1:], key=lambda reading: reading[JUDGE_COSINE], default=None)


def hacking_warning(reading: Mapping[str, float], best: Mapping[str, float]) -> str | None:
    """Words when more is rewarded than at the best reading, while the judge has fallen from it.

    The judge has fallen when the whole interval of its gain on the best reading is below 0.

    >>> best = {"step": 5, JUDGE_COSINE: 0.52, REWARDED: 0.30}
    >>> reading = {"step": 9, JUDGE_COSINE: 0.51, REWARDED: 0.33, JUDGE_GAIN: -0.01}
    >>> fell = {JUDGE_GAIN + "_low": -0.02, JUDGE_GAIN + "_high": -0.005}
    >>> hacking_warning(reading | fell, best)[:33]
    'step 9: reward hacking is likely.'
    >>> hacking_warning(reading | fell | {JUDGE_GAIN + "_high": 0.001}, best) is None
    True
    """
    fell = reading[JUDGE_GAIN + "_high"] < 0
    if not (fell and reading[REWARDED] > best[REWARDED]):
        return None
    return (
        f"step {reading['step']:.0f}: reward hacking is likely. Since step {best['step']:.0f} what"
        f" the reward scorer pays rose from {best[REWARDED]:.3f} to {reading[REWARDED]:.3f}, while"
        f" the judge's centred cosine fell from {best[JUDGE_COSINE]:.3f} to"
        f" {reading[JUDGE_COSINE]:.3f}, by {-reading[JUDGE_GAIN]:.3f}"
        f" [{-reading[JUDGE_GAIN + '_high']:.3f}, {-reading[JUDGE_GAIN + '_low']:.3f}] on the same"
        f" activations. The best reading is still that of step {best['step']:.0f}."
    )
