"""The report by layer, where one verbalizer describes several: claims, and the linear scorer.

The other scorers are a base up to one block, and so of one layer; a ridge from the same features is
fitted to each. Pure: it knows neither models nor files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nla_ray.report.claim_figures import claim_figures
from nla_ray.report.evaluated import Evaluated
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.metrics import Figure, figures

LAYER_CLAIMS = (
    "precision",
    "precision_shuffled",
    "precision_excess",
    "hallucinated",
    "domain",
    "repeats",
    "tokens",
)
LAYER_METRICS = ("centred_cosine", "top1_10way")
"""Of the linear scorer, which is `linear.{metric}` in the section."""


def layer_section(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """layer -> verbalizer -> claims, and the linear scorer's figures as `linear.{metric}`.

    The base's layer comes first; empty where there is no other. What the gold labels claim is the
    same at all, what can be read of an activation in them is not.
    """
    if not evaluated.layers:
        return {}
    speakers = list(next(iter(evaluated.layers.values())).descriptions)
    own = {
        name: _figures(
            evaluated.claims[name],
            evaluated.read("linear", evaluated.texts_of(name)),
            evaluated.comparisons,
        )
        for name in speakers
    }
    by_layer: dict[str, dict[str, dict[str, Figure]]] = {str(evaluated.layer): own}
    for layer, rows in evaluated.layers.items():
        there = dataclasses.replace(evaluated, descriptions=rows.descriptions)
        by_layer[str(layer)] = {
            name: _figures(claim_figures(there, name), rows.read.get(name), rows.comparisons)
            for name in speakers
        }
    return {
        layer: {name: bootstrap.intervals(named) for name, named in by_name.items()}
        for layer, by_name in by_layer.items()
    }


def _figures(
    claims: Mapping[str, Figure], read: Tensor | None, comparisons: Comparisons
) -> dict[str, Figure]:
    chosen = {name: claims[name] for name in LAYER_CLAIMS if name in claims}
    if read is not None:
        scored = figures(read, comparisons)
        chosen |= {f"linear.{metric}": scored[metric] for metric in LAYER_METRICS}
    return chosen
