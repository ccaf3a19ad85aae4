"""What N samples of one activation are good for: the best of them, and how far they agree.

Pure: it knows neither models nor files. Protects the rule that the reward scorer alone chooses; the
judge says what the choice is worth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nla_ray.report.controls import SCORERS
from nla_ray.report.evaluated import Evaluated
from nla_ray.score.bootstrap import FamilyBootstrap, Interval
from nla_ray.score.choice import agreement, best_of
from nla_ray.score.metrics import Figure, figures

CONFIDENCE_METRICS = ("top1", "top1_10way", "centred_cosine")
_CONFIDENCE_BINS = 5
_SAMPLE_COUNTS = (1, 2, 4, 8, 16)


def sample_sections(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """`best_of` N by the reward scorer; of several samples also `confidence` and `calibration`."""
    count = len(evaluated.samples[0])
    texts = [sample.text for drawn in evaluated.samples for sample in drawn]
    read = {
        scorer: evaluated.read(scorer, texts).reshape(len(evaluated.samples), count, -1)
        for scorer in SCORERS
    }
    best = [
        {"samples": size, **_best_of(bootstrap, evaluated, read, size)}
        for size in _SAMPLE_COUNTS
        if size <= count
    ]
    if count == 1:
        return {"best_of": best}
    confidence = agreement(read["reward"], evaluated.comparisons.mean)
    return {
        "best_of": best,
        "confidence": {
            "samples": count,
            **_confident_half(bootstrap, evaluated, confidence),
            "rank_correlation": rank_correlation(
                confidence, _judged(evaluated)["centred_cosine"].numerator
            ),
        },
        "calibration": _calibration(bootstrap, evaluated, confidence),
    }


def _best_of(
    bootstrap: FamilyBootstrap, evaluated: Evaluated, read: dict[str, Tensor], size: int
) -> dict[str, dict[str, Interval]]:
    """scorer -> figures of the best among the first `size` samples of every row."""
    comparisons = evaluated.comparisons
    chosen = best_of(read["reward"][:, :size], comparisons.originals, comparisons.mean)
    rows = torch.arange(len(comparisons))
    by_scorer = {}
    for scorer in SCORERS:
        named = figures(read[scorer][rows, chosen], comparisons)
        wanted = {metric: named[metric] for metric in CONFIDENCE_METRICS}
        by_scorer[scorer] = bootstrap.intervals(wanted)
    return by_scorer


def _confident_half(
    bootstrap: FamilyBootstrap, evaluated: Evaluated, confidence: Tensor
) -> dict[str, dict[str, Interval]]:
    """scorer -> figures on the more confident half of the rows, less those on the rest.

    Figures of the greedy description.
    """
    order = confidence.argsort(stable=True)
    upper = torch.zeros(len(order), dtype=torch.float64)
    upper[order[len(order) // 2 :]] = 1.0
    by_scorer = {}
    for scorer, named in evaluated.geometry[evaluated.sampled].items():
        values = {metric: named[metric].numerator for metric in CONFIDENCE_METRICS}
        by_scorer[scorer] = bootstrap.differences(
            {metric: Figure(value * upper, upper) for metric, value in values.items()},
            {metric: Figure(value * (1 - upper), 1 - upper) for metric, value in values.items()},
        )
    return by_scorer


def _calibration(
    bootstrap: FamilyBootstrap, evaluated: Evaluated, confidence: Tensor
) -> list[dict[str, Any]]:
    """The judge's figures by quantile of the confidence, the least confident rows first."""
    judged = _judged(evaluated)
    bins = []
    for rows in confidence.argsort(stable=True).tensor_split(_CONFIDENCE_BINS):
        inside = torch.zeros(len(confidence), dtype=torch.float64)
        inside[rows] = 1.0
        named = {
            f"judge_{metric}": Figure(judged[metric].numerator * inside, inside)
            for metric in CONFIDENCE_METRICS
        }
        bins.append(
            {
                "confidence_low": confidence[rows].min().item(),
                "confidence_high": confidence[rows].max().item(),
                **bootstrap.intervals(named),
            }
        )
    return bins


def _judged(evaluated: Evaluated) -> dict[str, Figure]:
    """The judge's figures of the greedy descriptions by the verbalizer that was sampled."""
    return evaluated.geometry[evaluated.sampled]["judge"]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of the ranks; equal values share the mean of theirs.

    >>> rank_correlation(torch.tensor([0.1, 1.0, 2.0]), torch.tensor([7.0, 8.0, 9.0]))
    1.0
    """
    ranks = torch.stack([_mean_ranks(first), _mean_ranks(second)])
    return torch.corrcoef(ranks)[0, 1].item()


def _mean_ranks(values: Tensor) -> Tensor:
    _, position, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[position]
