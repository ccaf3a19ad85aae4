"""How much of a score is wording: what is lost when the same claims stand otherwise.

It knows neither models nor files; `score/rewording.py` has the rewordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nla_ray.description.record import Description
from nla_ray.report.controls import SCORERS
from nla_ray.report.evaluated import Evaluated
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.metrics import Figure, figures
from nla_ray.score.rewording import FORMS

_METRICS = ("centred_cosine", "top1_10way")


def reword_descriptions(
    descriptions: Mapping[str, Sequence[Description]], names: Sequence[str], rows: Sequence[int]
) -> dict[str, dict[str, list[str]]]:
    """verbalizer -> form of FORMS -> its descriptions of these rows reworded."""
    reworded: dict[str, dict[str, list[str]]] = {}
    for name in names:
        texts = [descriptions[name][row].text for row in rows]
        reworded[name] = {form: [reword(text) for text in texts] for form, reword in FORMS.items()}
    return reworded


def wording_section(evaluated: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """verbalizer -> form -> `changed`, and scorer -> what the reworded descriptions lose.

    `changed`: share of descriptions that the form changes. What is lost: the figure of the
    descriptions as they are, less that of the reworded ones, on the same rows.
    """
    if not evaluated.reworded:
        return {}
    rows = list(evaluated.reworded_rows)
    comparisons = evaluated.comparisons.at(torch.tensor(rows))
    bootstrap = FamilyBootstrap([evaluated.family_ids[row] for row in rows], resamples, seed)
    section: dict[str, Any] = {}
    for name, by_form in evaluated.reworded.items():
        whole = [evaluated.descriptions[name][row].text for row in rows]
        before = {scorer: figures(evaluated.read(scorer, whole), comparisons) for scorer in SCORERS}
        section[name] = {}
        for form, texts in by_form.items():
            changed = [new != old for new, old in zip(texts, whole, strict=True)]
            lost = bootstrap.intervals({"changed": Figure.mean(changed)})
            by_scorer = {}
            for scorer in SCORERS:
                after = figures(evaluated.read(scorer, texts), comparisons)
                wanted = {metric: before[scorer][metric] for metric in _METRICS}
                by_scorer[scorer] = bootstrap.differences(wanted, after)
            section[name][form] = {**lost, **by_scorer}
    return section
