"""Watches for reward hacking while GRPO runs, on validation documents.

Every so many steps the verbalizer describes the same validation activations greedily, and both
scorers reconstruct them. The judge pays nothing. When the reward rises while the judge falls out of
the interval of its best reading, the run says so and marks the step. Knows neither TRL nor the
trainer; the figures are those of `score/metrics.py`.
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
from nla_ray.score.bootstrap import DocumentBootstrap
from nla_ray.score.claims import claim_precision, repeats_item
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.metrics import Figure
from nla_ray.settings.config import GRPOSettings

PREFIX = "monitor/"
"""What the names of figures begin with in a reading."""
JUDGE_COSINE = PREFIX + "judge_centred_cosine"
REWARDED = PREFIX + "rewarded"
WARNED = PREFIX + "warned"
_RESAMPLES = 2_000


@dataclass(frozen=True, kw_only=True)
class MonitorData:
    """The validation activations that are described again and again."""

    rows: list[int]
    """Rows of the validation bank."""
    comparisons: Comparisons
    """The activations, the train mean, and what each activation is compared with."""
    doc_ids: list[str]
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
        self._bootstrap = DocumentBootstrap(data.doc_ids, resamples=_RESAMPLES, seed=settings.seed)

    def read(self, weights: PublishedWeights) -> dict[str, float]:
        """Describe the validation activations, reconstruct twice, and sum up."""
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
        return self._geometry(judged, rewarded) | text_figures(written, self.data.texts)

    def _geometry(self, judged: Tensor, rewarded: Tensor) -> dict[str, float]:
        right = vectors.cosine(judged, self._comparisons.originals)
        figures = {
            "judge_centred_cosine": Figure.mean(self._centred(judged)),
            "judge_top1": Figure.mean(right > self._garbage(judged)),
            "reward_centred_cosine": Figure.mean(self._centred(rewarded)),
            "rewarded": Figure.mean(self._paid(rewarded)),
        }
        reading: dict[str, float] = {}
        for name, interval in self._bootstrap.intervals(figures).items():
            reading |= {
                PREFIX + name: interval.value,
                f"{PREFIX}{name}_low": interval.low,
                f"{PREFIX}{name}_high": interval.high,
            }
        return reading

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
    """The reading with the judge's highest centred cosine, the earliest of equals; None of none."""
    return max(readings, key=lambda reading: reading[JUDGE_COSINE], default=None)


def hacking_warning(reading: Mapping[str, float], best: Mapping[str, float]) -> str | None:
    """Words when the reward rose above the best reading's and the judge fell below its interval.

    >>> best = {"step": 5, JUDGE_COSINE: 0.52, JUDGE_COSINE + "_low": 0.49, REWARDED: 0.30}
    >>> best[JUDGE_COSINE + "_high"] = 0.55
    >>> hacking_warning({"step": 9, JUDGE_COSINE: 0.47, REWARDED: 0.33}, best)[:33]
    'step 9: reward hacking is likely.'
    >>> hacking_warning({"step": 9, JUDGE_COSINE: 0.50, REWARDED: 0.33}, best) is None
    True
    """
    fell = reading[JUDGE_COSINE] < best[JUDGE_COSINE + "_low"]
    if not (fell and reading[REWARDED] > best[REWARDED]):
        return None
    return (
        f"step {reading['step']:.0f}: reward hacking is likely. Since step {best['step']:.0f} what"
        f" the reward scorer pays rose from {best[REWARDED]:.3f} to {reading[REWARDED]:.3f}, while"
        f" the judge's centred cosine fell from {best[JUDGE_COSINE]:.3f}"
        f" [{best[JUDGE_COSINE + '_low']:.3f}, {best[JUDGE_COSINE + '_high']:.3f}] to"
        f" {reading[JUDGE_COSINE]:.3f}. The checkpoint of step {best['step']:.0f} is kept."
    )
