"""Gates: what a report must show to pass. A preset names them.

A gate is (figure, relation, threshold). Figures are named by where they stand in the report:

    grpo.judge.top1                       of a verbalizer under a scorer
    gold.judge.recovered                  of its reconstructions, put back into the base
    sft.claims.domain                     of what a verbalizer claims
    grpo.probe.difference                 of its words beside those of a linear probe
    grpo-sft.judge.centred_cosine         a paired difference under a scorer
    grpo-sft.claims.precision_excess      a paired difference of what is claimed
    grpo/sft.judge.delta                  a paired ratio
    confidence.judge.top1                 the more confident half's less the rest's
    claim_confidence.kept_80.precision    of claims that are kept from .8 on

The bound of the 95% interval that is worse for the claim decides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nla_ray.report.claim_confidence import KEPT_FIGURES, KEPT_FROM
from nla_ray.report.claim_figures import CLAIM_FIGURES
from nla_ray.report.controls import CONTROLS, SCORERS, VERBALIZERS, pairs_of
from nla_ray.report.matched import PROBE_FIGURES
from nla_ray.report.recovered import PATCH_FIGURES
from nla_ray.report.samples import CONFIDENCE_METRICS
from nla_ray.score.metrics import METRICS
from nla_ray.settings.config import Gate

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def check_gates(gates: Sequence[Gate]) -> None:
    """Raise ValueError for a gate that names a figure no report has."""
    for name, relation, _ in gates:
        if relation not in _RELATIONS or not _names_figure(name):
            pairs = ", ".join("-".join(pair) for pair in pairs_of(VERBALIZERS))
            raise ValueError(
                f"gate: got {name!r} {relation!r}, expected VERBALIZER.SCORER.METRIC,"
                " VERBALIZER.claims.FIGURE, VERBALIZER.probe.FIGURE, FIRST-SECOND in place of the"
                f" verbalizer ({pairs}), FIRST/SECOND.SCORER.delta,"
                f" confidence.SCORER.{'|'.join(CONFIDENCE_METRICS)} or"
                f" claim_confidence.{'|'.join(KEPT_FROM)}.{'|'.join(KEPT_FIGURES)},"
                " with a relation of >=, >, <=, <. Correct --evaluation.gates."
            )


def _names_figure(name: str) -> bool:
    if name.count(".") != 2:
        return False
    subject, scorer, metric = name.split(".")
    pairs = pairs_of(VERBALIZERS)
    if subject == "confidence":
        return scorer in SCORERS and metric in CONFIDENCE_METRICS
    if subject == "claim_confidence":
        return scorer in KEPT_FROM and metric in KEPT_FIGURES
    if "/" in subject:
        return tuple(subject.split("/")) in pairs and scorer in SCORERS and metric == "delta"
    if not (tuple(subject.split("-")) in pairs if "-" in subject else subject in VERBALIZERS):
        return False
    if scorer == "claims":
        return metric in CLAIM_FIGURES
    if scorer == "probe":
        return subject in VERBALIZERS and subject not in CONTROLS and metric in PROBE_FIGURES
    return scorer in SCORERS and metric in {*METRICS, *PATCH_FIGURES}


def judge_gate(summary: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """`{name, relation, value, threshold, passed}` of one gate.

    `value` is the interval's bound that is worse for the claim. A figure that this report does not
    have (the ablation arm, when it was not trained) has value None and fails.
    """
    name, relation, threshold = gate
    subject, scorer, metric = name.split(".")
    if subject in ("confidence", "claim_confidence"):
        by_metric = summary.get(subject, {}).get(scorer, {})
    elif "-" in subject:
        by_metric = summary["paired"].get(subject, {}).get(scorer, {})
    elif "/" in subject:
        by_metric = summary["ratios"].get(subject, {}).get(scorer, {})
    elif scorer in ("claims", "probe"):
        by_metric = summary.get(scorer, {}).get(subject, {})
    else:
        by_metric = summary["results"].get(subject, {}).get(scorer, {})
    figure = by_metric.get(metric)
    value = None if figure is None else figure["low" if relation.startswith(">") else "high"]
    passed = value is not None and _RELATIONS[relation](value, threshold)
    return {
        "name": name,
        "relation": relation,
        "value": value,
        "threshold": threshold,
        "passed": passed,
    }
