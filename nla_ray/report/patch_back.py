"""Puts what scorers reconstruct back into the base, at the layer and position it stands for.

Knows the run, its base and its texts; `recovered.py` makes figures of what comes out. Each row is
kept in the report's folder until the report is published: an interrupted evaluation patches no row
twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_ray.activation.bank import ActivationTable, drawn_rows
from nla_ray.activation.patching import Drifted, Patched, Patcher, at_norm_of
from nla_ray.activation.positions import MEAN_POSITION
from nla_ray.activation.stage import captured_ids
from nla_ray.base.load import load_backbone
from nla_ray.description.record import Description
from nla_ray.report.controls import SCORERS
from nla_ray.report.readings import Readings
from nla_ray.report.recovered import PatchBack
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger, stage_progress
from nla_ray.run.metrics import MetricsLog

logger = get_logger(__name__)


def patch_reconstructions(
    run: Run,
    test: ActivationTable,
    descriptions: Mapping[str, Sequence[Description]],
    readings: Readings,
    mean: Tensor,
    scratch: Path,
) -> PatchBack | None:
    """Every scorer's reconstruction of every description of `evaluation.patch_rows` rows, seeded.

    A row after whose prompt the base's stream is no longer what was captured is left out and
    counted; a mean over tokens stands at no place in which to put anything. None where no row is
    asked for, or left. `mean`: mu. `scratch`: a folder for what is
    patched already.
    """
    settings = run.config.evaluation
    rows = drawn_rows(len(test), settings.patch_rows, settings.seed)
    if not rows:
        return None
    if MEAN_POSITION in test.positions:
        logger.warning("patch-back: left out: a mean over tokens stands at no token of the base")
        return None
    pairs = [(name, scorer) for name in descriptions for scorer in SCORERS]
    chosen = test.select(rows)
    directions = torch.stack(
        [
            readings.of(scorer, [descriptions[name][row].text for row in rows])
            for name, scorer in pairs
        ],
        dim=1,
    )
    directions = torch.cat([mean.expand(len(rows), 1, -1), directions], dim=1)
    records = _patch_rows(run, chosen, directions, _log(scratch, chosen, directions))
    return _collected(rows, pairs, records)


def _collected(
    rows: Sequence[int], pairs: Sequence[tuple[str, str]], records: Sequence[Mapping[str, Any]]
) -> PatchBack | None:
    """What was measured, without the rows that have drifted; None where all have.

    `pairs`: (verbalizer, scorer) of each value of a record but the first, the mean direction's.
    """
    kept = [number for number, record in enumerate(records) if record["divergence"]]
    if left_out := len(rows) - len(kept):
        logger.warning(
            "patch-back: %d of %d activations left out: the base reads their texts otherwise than"
            " at capture",
            left_out,
            len(rows),
        )
    if not kept:
        return None
    divergence = torch.tensor([records[number]["divergence"] for number in kept])
    keeps_top = torch.tensor([records[number]["keeps_top"] for number in kept])
    by_verbalizer: dict[str, dict[str, Patched]] = {name: {} for name, _ in pairs}
    for column, (name, scorer) in enumerate(pairs, 1):
        by_verbalizer[name][scorer] = Patched(
            divergence=divergence[:, column], keeps_top=keeps_top[:, column]
        )
    return PatchBack(
        rows=[rows[number] for number in kept],
        left_out=left_out,
        mean_divergence=divergence[:, 0],
        by_verbalizer=by_verbalizer,
    )


def _log(scratch: Path, chosen: ActivationTable, directions: Tensor) -> MetricsLog:
    """The file of these rows with these vectors: others have another one."""
    digest = hashlib.sha256("\0".join(chosen.ids).encode())
    digest.update(directions.contiguous().numpy().tobytes())
    return MetricsLog(scratch / f"patched-{digest.hexdigest()[:16]}.jsonl")


def _patch_rows(
    run: Run, chosen: ActivationTable, directions: Tensor, log: MetricsLog
) -> list[dict[str, Any]]:
    """Of each row the divergence and the verdict on the likeliest token, a value a vector.

    `directions`: [rows, vectors, d_model].
    """
    records = log.read()
    if len(records) == len(chosen):
        return records
    base, ids = run.config.base, captured_ids(run, chosen.text_ids)
    patcher = Patcher(load_backbone(base), base.layer)
    with stage_progress("patch back", len(chosen)) as advance:
        advance(len(records))
        for row in range(len(records), len(chosen)):
            before_and_at = ids[chosen.text_ids[row]][: chosen.positions[row] + 1]
            activation = chosen.vectors[row]
            replacements = at_norm_of(directions[row], activation)
            records.append(_record(patcher, before_and_at, activation, replacements))
            log.append(records[-1])
            advance(1)
    return records


def _record(
    patcher: Patcher, ids: Sequence[int], activation: Tensor, replacements: Tensor
) -> dict[str, Any]:
    """A line of the file; of a row that has drifted the lists are empty."""
    try:
        patched = patcher.patch(ids, activation, replacements)
    except Drifted:
        return {"divergence": [], "keeps_top": []}
    return {"divergence": patched.divergence.tolist(), "keeps_top": patched.keeps_top.tolist()}
