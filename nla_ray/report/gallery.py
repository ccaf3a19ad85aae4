"""Single activations as a reader sees them: the examples, the page's gallery, the table of scores.

Pure: it knows neither models nor files. Protects the rule that nothing shown was picked by hand or
by score: the gallery and the table have every activation, the examples are a seeded choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from nla_ray.activation.bank import ActivationTable
from nla_ray.report.controls import CONTROLS, SOURCE
from nla_ray.report.evaluated import Evaluated
from nla_ray.score import claims
from nla_ray.score.metrics import Figure
from nla_ray.settings.config import EvaluationConfig

_CHOICES = ("top1", "top1_2way", "top1_10way", "top1_10way_hard", "top1_100way")


def examples(
    evaluated: Evaluated, test: ActivationTable, settings: EvaluationConfig
) -> list[dict[str, Any]]:
    """Seeded rows of different domains, with the words of every verbalizer but the controls."""
    generator = torch.Generator().manual_seed(settings.seed)
    first_of_domain: dict[str, int] = {}
    for row in torch.randperm(len(test.ids), generator=generator).tolist():
        first_of_domain.setdefault(test.domains[row], row)
    shown = [name for name in evaluated.descriptions if name not in CONTROLS]
    return [
        {
            "activation_id": test.ids[row],
            "domain": test.domains[row],
            "text": test.texts[row],
            "descriptions": {name: evaluated.descriptions[name][row].text for name in shown},
        }
        for row in list(first_of_domain.values())[: settings.examples]
    ]


def gallery(evaluated: Evaluated, test: ActivationTable) -> list[dict[str, Any]]:
    """One entry an activation: its text, and what every verbalizer says of it, with its scores."""
    scores = {
        name: _scores_by_row(by_scorer, len(test.ids))
        for name, by_scorer in evaluated.geometry.items()
    }
    entries = []
    for row, text in enumerate(test.texts):
        descriptions = {}
        for name, described in evaluated.descriptions.items():
            if name == SOURCE:
                continue  # stands beside the descriptions
            precision = evaluated.claims[name]["precision"].numerator[row].item()
            descriptions[name] = {
                "segments": claims.marked(described[row].text, text),
                "closed": described[row].closed,
                "tokens": described[row].num_tokens,
                "scores": scores[name][row],
                "precision": round(precision, 3),
            }
        entries.append(
            {
                "activation_id": test.ids[row],
                "doc_id": test.doc_ids[row],
                "domain": test.domains[row],
                "text": text,
                "descriptions": descriptions,
            }
        )
    return entries


def _scores_by_row(
    by_scorer: Mapping[str, Mapping[str, Figure]], rows: int
) -> list[dict[str, dict[str, Any]]]:
    """Row -> scorer -> the scores that the gallery shows of one verbalizer."""
    scores: list[dict[str, dict[str, Any]]] = [{} for _ in range(rows)]
    for scorer, named in by_scorer.items():
        columns = zip(
            named["centred_cosine"].numerator.tolist(),
            named["correct_cosine"].numerator.tolist(),
            named["top1"].numerator.bool().tolist(),
            named["mrr_10way"].numerator.tolist(),
            strict=True,
        )
        for row_scores, (centred, cosine, top1, reciprocal_rank) in zip(
            scores, columns, strict=True
        ):
            row_scores[scorer] = {
                "centred_cosine": round(centred, 3),
                "cosine": round(cosine, 3),
                "top1": top1,
                "rank_10way": round(1 / reciprocal_rank),
            }
    return scores


def score_table(evaluated: Evaluated, test: ActivationTable) -> pa.Table:
    """Cosines and choices of every description: a row an activation, verbalizer and scorer.

    A choice that some verbalizer or scorer lacks (too few activations) is left out.
    """
    by_pair = {
        (name, scorer): named
        for name, by_scorer in evaluated.geometry.items()
        for scorer, named in by_scorer.items()
    }
    cosines = {
        "cosine": "correct_cosine",
        "garbage_cosine": "garbage_cosine",
        "centred_cosine": "centred_cosine",
    }
    choices = [name for name in _CHOICES if all(name in named for named in by_pair.values())]
    columns: dict[str, list] = {
        name: [] for name in ("activation_id", "verbalizer", "scorer", *cosines, *choices)
    }
    for (name, scorer), named in by_pair.items():
        columns["activation_id"] += test.ids
        columns["verbalizer"] += [name] * len(test.ids)
        columns["scorer"] += [scorer] * len(test.ids)
        for column, metric in cosines.items():
            columns[column] += named[metric].numerator.tolist()
        for choice in choices:
            columns[choice] += named[choice].numerator.bool().tolist()
    return pa.table(columns)
