"""Watches for reward hacking while GRPO runs: what the judge, which pays nothing, says on
validation documents.

Every so many steps the verbalizer describes the same validation activations greedily; both scorers
reconstruct them. When what is rewarded rises while the judge falls out of the interval of its best
reading, the run says so and marks the step. It knows neither TRL nor the trainer; the figures are
`evaluation.metrics`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.cluster.actors import ActorPool
from nla_ray.description.record import Description
from nla_ray.reinforce.rollouts import PublishedWeights, RolloutRequest, generate
from nla_ray.reinforce.scoring import reconstruct
from nla_ray.score.bootstrap import DocumentBootstrap
from nla_ray.score.claims import claim_precision, repeats_item
from nla_ray.score.metrics import Comparisons, Figure
from nla_ray.settings.config import GRPOSettings

PREFIX = "monitor/"
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
    """The source text of each."""


class Monitor:
    """Takes readings; each is a flat dict of figures by name, ready for the metrics file."""

    def __init__(
        self, settings: GRPOSettings, data: MonitorData, rollouts: ActorPool, scorers: ActorPool
    ) -> None:
        self.settings, self.data = settings, data
        self._rollouts, self._scorers = rollouts, scorers
        self._comparisons = data.comparisons
        self._bootstrap = DocumentBootstrap(data.doc_ids, resamples=_RESAMPLES, seed=settings.seed)

    def read(self, weights: PublishedWeights) -> dict[str, float]:
        """Describe, reconstruct twice, and sum up."""
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
        figures = {
            "judge_centred_cosine": Figure.mean(self._centred(judged)),
            "judge_top1": Figure.mean(
                vectors.cosine(judged, self._comparisons.originals) > self._garbage(judged)
            ),
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
        """What the score term would pay on these activations: the contrast, centred or not, or the
        raw cosine of the ablation."""
        raw = vectors.cosine(reconstruction, self._comparisons.originals)
        if self.settings.contrast == "none":
            return raw
        repeated, wrong = (
            reconstruction.unsqueeze(1),
            self._comparisons.pool[self._comparisons.others],
        )
        if not self.settings.centred:
            return raw - vectors.cosine(repeated, wrong).mean(1)
        return self._centred(reconstruction) - vectors.centred_cosine(
            repeated, wrong, self._comparisons.mean
        ).mean(1)


def text_figures(written: Sequence[Description], texts: Sequence[str]) -> dict[str, float]:
    """Shares over descriptions: distinct, unclosed, repeating an item, claims found in the source;
    and the mean length."""
    count = len(written)
    return {
        PREFIX + "distinct_share": len({description.text for description in written}) / count,
        PREFIX + "unclosed_share": sum(not description.closed for description in written) / count,
        PREFIX + "repeating_share": (
            sum(repeats_item(description.text) for description in written) / count
        ),
        PREFIX + "claim_precision": (
            sum(
                claim_precision(description.text, text)
                for description, text in zip(written, texts, strict=True)
            )
            / count
        ),
        PREFIX + "mean_tokens": sum(description.num_sampled for description in written) / count,
    }


def best_reading(readings: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The reading with the highest centred cosine under the judge (the earliest of equals); None
    when there is none."""
    return max(readings, key=lambda reading: reading[JUDGE_COSINE], default=None)


def hacking_warning(reading: Mapping[str, float], best: Mapping[str, float]) -> str | None:
    """Words when the reward rose above the best reading's while the judge fell below the interval
    it had there.

    Example: best judge 0.52 [0.49, 0.55] at reward 0.30; now judge 0.47 at reward 0.33: a warning.
    Judge 0.50: none.
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
