"""How results grow: with the labels that SFT learned from, with the steps of GRPO, with the layer
that is read.

Collects what was measured elsewhere, in one form: named series of points, each a place and figures.
Labels are figures of this report (SFT runs named in `--compare` that differ by their number of
examples alone), steps are the monitor's readings on validation, layers are the gold ceilings of
`jobs/inspect_base.py`. What was not measured is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.reinforce.monitor import PREFIX
from nla_ray.report.compared import Compared
from nla_ray.run.manifest import Manifest

_METRICS = ("top1_2way", "top1_10way", "centred_cosine")
_READ = ("judge_centred_cosine", "reward_centred_cosine", "claim_precision")
"""Figures of a monitor's reading that are shown."""
_SIZE_ONLY = frozenset(("max_examples", "name"))
"""Settings of SFT by which the points of one curve may differ."""


def growth(
    results: Mapping[str, Any],
    manifests: Mapping[str, Manifest],
    compared: Sequence[Compared],
    training: Mapping[str, Sequence[Mapping[str, float]]],
    inspection: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """`labels`, `steps` and `layers`, each where there is more than one point: series by name ->
    [{at, figure: interval or value}]."""
    layers = (inspection or {}).get("layers", {})
    told = {
        "labels": _by_labels(results, manifests["sft"], compared),
        "steps": {
            name: [_reading(record) for record in records if PREFIX + _READ[0] in record]
            for name, records in training.items()
        },
        "layers": {"gold": [{"at": int(layer), **one["ceiling"]} for layer, one in layers.items()]},
    }
    kept = {
        axis: {name: points for name, points in by_name.items() if len(points) > 1}
        for axis, by_name in told.items()
    }
    return {axis: by_name for axis, by_name in kept.items() if by_name}


def _by_labels(
    results: Mapping[str, Any], sft: Manifest, compared: Sequence[Compared]
) -> dict[str, list[dict[str, Any]]]:
    """scorer -> the figures of SFT by its number of examples."""
    sizes = {"sft": sft} | {
        one.name: one.manifest
        for one in compared
        if one.manifest and _differs_in_size(one.manifest, sft)
    }
    order = sorted(sizes, key=lambda name: sizes[name].metrics["examples"])
    return {
        scorer: [
            {
                "at": sizes[name].metrics["examples"],
                **{metric: results[name][scorer][metric] for metric in _METRICS},
            }
            for name in order
        ]
        for scorer in results["sft"]
    }


def _differs_in_size(other: Manifest, sft: Manifest) -> bool:
    """Whether it is an SFT run from the same texts that differs from `sft` by its number of
    examples."""
    if other.config.keys() != sft.config.keys() or other.parents != sft.parents:
        return False
    ours, theirs = (
        {
            **one.config,
            "sft": {
                name: value for name, value in one.config["sft"].items() if name not in _SIZE_ONLY
            },
        }
        for one in (sft, other)
    )
    return ours == theirs and other.metrics["examples"] != sft.metrics["examples"]


def _reading(record: Mapping[str, float]) -> dict[str, Any]:
    """One reading of the monitor; an interval where it has one."""
    point: dict[str, Any] = {"at": int(record["step"])}
    for name in _READ:
        value, low, high = (record.get(PREFIX + name + end) for end in ("", "_low", "_high"))
        if value is not None:
            point[name] = (
                {"value": value} if low is None else {"value": value, "low": low, "high": high}
            )
    return point
