"""Gates: what a report must show to pass. They belong to the preset and are computed from test
documents, once.

A gate is (figure, relation, threshold). Figures are named by where they stand in the report:

    grpo.judge.top1                       of a verbalizer under a scorer
    sft.claims.domain                     of what a verbalizer claims
    grpo-sft.judge.centred_cosine         a paired difference; `grpo-sft.claims.precision_excess`
                                          likewise
    grpo/sft.judge.delta                  a paired ratio
    confidence.judge.top1                 the more confident half's less the rest's

The bound of the 95% interval that is worse for the claim decides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nla_ray.report.controls import SCORERS, VERBALIZERS
from nla_ray.score.metrics import METRICS
from nla_ray.settings.config import Gate

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def check_gates(
    gates: Sequence[Gate],
    claim_figures: Sequence[str],
    confidence_metrics: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> None:
    """Raise ValueError for a gate that names a figure no report has, before hours are spent on
    computing figures."""
    for name, relation, _ in gates:
        if relation not in _RELATIONS or not _names_figure(
            name, claim_figures, confidence_metrics, pairs
        ):
            raise ValueError(
                f"gate: got {name!r} {relation!r}, expected VERBALIZER.SCORER.METRIC,"
                " VERBALIZER.claims.FIGURE, FIRST-SECOND in place of the verbalizer"
                f" ({', '.join(map('-'.join, pairs))}), FIRST/SECOND.SCORER.delta or"
                f" confidence.SCORER.{'|'.join(confidence_metrics)}, with a relation of >=, >, <=,"
                " <. Correct --evaluation.gates."
            )


def _names_figure(
    name: str,
    claim_figures: Sequence[str],
    confidence_metrics: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> bool:
    if name.count(".") != 2:
        return False
    subject, scorer, metric = name.split(".")
    if subject == "confidence":
        return scorer in SCORERS and metric in confidence_metrics
    if "/" in subject:
        return tuple(subject.split("/")) in pairs and scorer in SCORERS and metric == "delta"
    known = tuple(subject.split("-")) in pairs if "-" in subject else subject in VERBALIZERS
    return known and (
        metric in claim_figures if scorer == "claims" else scorer in SCORERS and metric in METRICS
    )


def judge_gate(summary: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """`{name, relation, value, threshold, passed}`; `value` is the interval's bound that is worse
    for the claim.

    A figure that this report does not have (the ablation arm, when it was not trained) has value
    None and fails.
    """
    name, relation, threshold = gate
    subject, scorer, metric = name.split(".")
    if subject == "confidence":
        place = summary.get("confidence", {}).get(scorer, {})
    elif "-" in subject or "/" in subject:
        place = summary["paired" if "-" in subject else "ratios"].get(subject, {}).get(scorer, {})
    elif scorer == "claims":
        place = summary["claims"].get(subject, {})
    else:
        place = summary["results"].get(subject, {}).get(scorer, {})
    figure = place.get(metric)
    value = None if figure is None else figure["low" if relation.startswith(">") else "high"]
    passed = value is not None and _RELATIONS[relation](value, threshold)
    return {
        "name": name,
        "relation": relation,
        "value": value,
        "threshold": threshold,
        "passed": passed,
    }
