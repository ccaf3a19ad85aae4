"""How results grow with labels of SFT, with steps of GRPO, and with the layer that is read.

Collects what was measured elsewhere, in one form: named series of points, each a number and
figures. Labels are figures of this report (SFT runs named in `--compare` that differ by their
number of examples alone), steps are the monitor's readings on validation, layers are the gold
ceilings of `jobs/inspect_base.py`. What was not measured is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.reinforce.monitor import PREFIX
from nla_ray.report.compared import Compared
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.run.metrics import METRICS_NAME
from nla_ray.run.stages import INSPECTION_FORMAT, INSPECTION_NAME

logger = get_logger(__name__)

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
    """`labels`, `steps` and `layers` -> name of a series -> [{at, figure: interval or value}].

    A series of a single point is left out, and so is an axis without a series.
    """
    axes = {
        "labels": _by_labels(results, manifests["sft"], compared),
        "steps": {name: _by_steps(records) for name, records in training.items()},
        "layers": {"gold": _by_layers(inspection)},
    }
    curves = {}
    for axis, series in axes.items():
        long_enough = {name: points for name, points in series.items() if len(points) > 1}
        if long_enough:
            curves[axis] = long_enough
    return curves


def _by_labels(
    results: Mapping[str, Any], sft: Manifest, compared: Sequence[Compared]
) -> dict[str, list[dict[str, Any]]]:
    """scorer -> the figures of SFT by its number of examples."""
    examples = {"sft": sft.metrics["examples"]}
    for verbalizer in compared:
        if verbalizer.manifest and _differs_in_size(verbalizer.manifest, sft):
            examples[verbalizer.name] = verbalizer.manifest.metrics["examples"]
    curves = {}
    for scorer in results["sft"]:
        curves[scorer] = []
        for name in sorted(examples, key=examples.__getitem__):
            figures = {metric: results[name][scorer][metric] for metric in _METRICS}
            curves[scorer].append({"at": examples[name], **figures})
    return curves


def _differs_in_size(another: Manifest, sft: Manifest) -> bool:
    """Whether an artifact is SFT from the same texts with another number of examples alone."""
    if another.config.keys() != sft.config.keys() or another.parents != sft.parents:
        return False
    same_settings = _without_size(another.config) == _without_size(sft.config)
    return same_settings and another.metrics["examples"] != sft.metrics["examples"]


def _without_size(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in config["sft"].items() if name not in _SIZE_ONLY}
    return {**config, "sft": settings}


def _by_steps(records: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The monitor's readings among the records of a training."""
    return [_reading(record) for record in records if PREFIX + _READ[0] in record]


def _by_layers(inspection: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The gold ceiling of every layer that was inspected."""
    layers = (inspection or {}).get("layers", {})
    return [{"at": int(layer), **found["ceiling"]} for layer, found in layers.items()]


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


# What other stages wrote down ---------------------------------------------------------------------


def read_training_records(
    run: Run, manifests: Mapping[str, Manifest]
) -> dict[str, list[dict[str, float]]]:
    """What training wrote down step by step, by artifact."""
    records = {}
    for name, manifest in manifests.items():
        if METRICS_NAME in manifest.files:
            lines = run.verified(name, manifest, METRICS_NAME).read_text().splitlines()
            records[name] = [json.loads(line) for line in lines]
    return records


def read_inspection(run: Run) -> dict[str, Any] | None:
    """What `jobs/inspect_base.py` found out about the base; None when it was not run on it."""
    file = run.root / INSPECTION_NAME
    if not file.exists():
        return None
    inspection = json.loads(file.read_text())
    expected = (run.config.base.model, INSPECTION_FORMAT)
    if (inspection["base"], inspection.get("format")) != expected:
        logger.warning(
            "report: %s is of another base or of an earlier version, left out; make it again with"
            " jobs/inspect_base.py",
            file,
        )
        return None
    return inspection
