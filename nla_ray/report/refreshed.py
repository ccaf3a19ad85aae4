"""Verbalizer before and after GRPO, read by a scorer of labels and by one that knows their style.

The scorer of labels is the reward scorer. The refreshed one has learned from SFT's descriptions
too. What GRPO gains under the first alone it may owe to the way it writes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_ray.report.controls import CONTROLS, REFRESHED
from nla_ray.report.evaluated import Evaluated
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.metrics import Figure, figures

LABELS = "reward"
"""The scorer that was trained on labels."""
_METRICS = ("centred_cosine", "top1_10way", "top1_10way_hard")
"""Means of a value a row, so that differences of them are means too."""
_Named = Mapping[str, Figure]


def two_by_two(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """Verbalizer, or `{first}-{second}` -> `reward`, `refreshed` and their difference -> metric.

    The difference is `refreshed` less `reward`. Empty for a report without a refreshed scorer.
    """
    if evaluated.refreshed is None:
        return {}
    read: dict[str, dict[str, _Named]] = {}
    for name in evaluated.descriptions:
        texts = evaluated.texts_of(name)
        if name not in CONTROLS and evaluated.refreshed.holds(texts):
            found = figures(evaluated.refreshed.of(REFRESHED, texts), evaluated.comparisons)
            read[name] = {
                LABELS: _chosen(evaluated.geometry[name][LABELS]),
                REFRESHED: _chosen(found),
            }
    for first, second in evaluated.pairs:
        if first in read and second in read:
            read[f"{first}-{second}"] = {
                scorer: _less(read[first][scorer], read[second][scorer])
                for scorer in (LABELS, REFRESHED)
            }
    return {
        name: {
            **{scorer: bootstrap.intervals(named) for scorer, named in by_scorer.items()},
            "difference": bootstrap.intervals(_less(by_scorer[REFRESHED], by_scorer[LABELS])),
        }
        for name, by_scorer in read.items()
    }


def _chosen(named: _Named) -> dict[str, Figure]:
    return {metric: named[metric] for metric in _METRICS}


def _less(first: _Named, second: _Named) -> dict[str, Figure]:
    """The means of the rows' differences."""
    return {
        metric: Figure.mean(first[metric].numerator - second[metric].numerator)
        for metric in _METRICS
    }
