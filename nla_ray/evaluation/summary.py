"""From descriptions and reconstructions to the report's figures: one dictionary, every number with its interval.

Pure: it knows neither models nor files. `results[verbalizer][scorer][metric]`, `claims[verbalizer][figure]`, paired
differences, agreement of the scorers, figures by domain, and gates. A figure's name in a gate is
`{verbalizer}.{scorer}.{metric}`, `{verbalizer}-{verbalizer}.{scorer}.{metric}` or `{verbalizer}.claims.{figure}`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_ray.evaluation import claims
from nla_ray.evaluation.bootstrap import DocumentBootstrap
from nla_ray.evaluation.controls import VERBALIZERS
from nla_ray.evaluation.metrics import METRICS, Comparisons, Figure, figures

SCORERS = ("reward", "judge")
PAIRS = (("grpo", "sft"), ("grpo", "nearest_train_label"), ("sft", "nearest_train_label"), ("grpo", "grpo_no_contrast"))
PAIRED_METRICS = ("centred_cosine", "delta", "top1", "top1_10way")
CLAIM_FIGURES = ("precision", "precision_shuffled", "recall", "domain", "repeats", "distinct", "unclosed", "empty",
                 "tokens")
_DOMAIN_FIGURES = ("precision", "domain")
_BY_DOMAIN = ("gold", "sft", "grpo")
_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Described:
    """What one verbalizer said of one activation; `num_tokens` counts the description alone."""

    text: str
    closed: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The test rows and everything that was said of them; every list has one entry a row."""

    doc_ids: Sequence[str]
    domains: Sequence[str]
    texts: Sequence[str]
    comparisons: Comparisons
    descriptions: Mapping[str, Sequence[Described]]
    """By verbalizer."""
    reconstructions: Mapping[str, Mapping[str, Tensor]]
    """By verbalizer and scorer: [rows, d_model]."""
    domain_names: Mapping[str, str]
    """Slug -> the name a description may use."""


def summarise(evaluated: Evaluated, gates: Sequence[tuple[str, str, float]], resamples: int,
              seed: int) -> dict[str, Any]:
    """Every figure of the report as plain JSON values."""
    bootstrap = DocumentBootstrap(evaluated.doc_ids, resamples, seed)
    geometry = {verbalizer: {scorer: figures(rows, evaluated.comparisons) for scorer, rows in by_scorer.items()}
                for verbalizer, by_scorer in evaluated.reconstructions.items()}
    said = {verbalizer: claim_figures(evaluated, verbalizer) for verbalizer in evaluated.descriptions}
    summary: dict[str, Any] = {
        "n": len(evaluated.doc_ids),
        "documents": len(set(evaluated.doc_ids)),
        "results": {verbalizer: {scorer: _intervals(bootstrap, named) for scorer, named in by_scorer.items()}
                    for verbalizer, by_scorer in geometry.items()},
        "claims": {verbalizer: _intervals(bootstrap, named) for verbalizer, named in said.items()},
        "paired": _paired(bootstrap, geometry),
        "agreement": {verbalizer: _agreement(by_scorer) for verbalizer, by_scorer in geometry.items()},
        "domains": _by_domain(evaluated, said, resamples, seed),
        "confusion": {verbalizer: _confusion(evaluated, verbalizer) for verbalizer in _BY_DOMAIN if verbalizer in said},
    }
    return {**summary, "gates": [judge_gate(summary, gate) for gate in gates]}


def claim_figures(evaluated: Evaluated, verbalizer: str) -> dict[str, Figure]:
    """The figures of CLAIM_FIGURES for one verbalizer. A description that claims nothing has precision and recall 0.

    `precision_shuffled`: against the text of the wrong row. `recall`: share of the gold label's claims that are made
    too. `distinct`: distinct descriptions over descriptions.
    """
    described = evaluated.descriptions[verbalizer]
    texts = [one.text for one in described]
    own = list(zip(texts, evaluated.texts, strict=True))
    wrong_rows = evaluated.comparisons.wrong.tolist()
    wrong = [(text, evaluated.texts[row]) for text, row in zip(texts, wrong_rows, strict=True)]
    gold = [(text, one.text) for text, one in zip(texts, evaluated.descriptions["gold"], strict=True)]
    copies = Counter(texts)
    return {
        "precision": Figure.mean([claims.claim_precision(text, source) for text, source in own]),
        "precision_shuffled": Figure.mean([claims.claim_precision(text, other) for text, other in wrong]),
        "recall": Figure.mean([_recall(text, label) for text, label in gold]),
        "domain": Figure.mean([claims.domain_named(text, domain, evaluated.domain_names)
                               for text, domain in zip(texts, evaluated.domains, strict=True)]),
        "repeats": Figure.mean([claims.repeats_item(text) for text in texts]),
        "distinct": Figure.mean([1.0 / copies[text] for text in texts]),
        "unclosed": Figure.mean([not one.closed for one in described]),
        "empty": Figure.mean([not one.text.strip() for one in described]),
        "tokens": Figure.mean([one.num_tokens for one in described]),
    }


def _recall(description: str, gold: str) -> float:
    wanted = claims.salient_words(gold)
    return len(wanted & claims.salient_words(description)) / len(wanted) if wanted else 0.0


def check_gates(gates: Sequence[tuple[str, str, float]]) -> None:
    """Raise ValueError for a gate that names no figure, before hours are spent on computing figures."""
    for name, relation, _ in gates:
        if relation not in _RELATIONS or not _names_figure(name):
            raise ValueError(f"gate: got {name!r} {relation!r}, expected VERBALIZER.SCORER.METRIC, "
                             "VERBALIZER.claims.FIGURE or FIRST-SECOND.SCORER.METRIC with a relation of >=, >, <=, <. "
                             "Correct --evaluation.gates.")


def _names_figure(name: str) -> bool:
    if name.count(".") != 2:
        return False
    subject, scorer, metric = name.split(".")
    if "-" in subject:
        return tuple(subject.split("-")) in PAIRS and scorer in SCORERS and metric in PAIRED_METRICS
    if subject not in VERBALIZERS:
        return False
    return metric in CLAIM_FIGURES if scorer == "claims" else scorer in SCORERS and metric in METRICS


def judge_gate(summary: Mapping[str, Any], gate: tuple[str, str, float]) -> dict[str, Any]:
    """`{name, relation, value, threshold, passed}`; `value` is the interval's bound that is worse for the claim.

    A figure that this report does not have (the ablation arm, when it was not trained) has value None and fails.
    """
    name, relation, threshold = gate
    verbalizer, scorer, metric = name.split(".")
    section = "paired" if "-" in verbalizer else "claims" if scorer == "claims" else "results"
    figure = summary[section].get(verbalizer, {})
    figure = figure.get(metric) if section == "claims" else figure.get(scorer, {}).get(metric)
    value = None if figure is None else figure["low" if relation.startswith(">") else "high"]
    passed = value is not None and _RELATIONS[relation](value, threshold)
    return {"name": name, "relation": relation, "value": value, "threshold": threshold, "passed": passed}


def _intervals(bootstrap: DocumentBootstrap, named: Mapping[str, Figure]) -> dict[str, dict[str, float | int]]:
    return {name: interval.to_dict() for name, interval in bootstrap.intervals(named).items()}


def _paired(bootstrap: DocumentBootstrap, geometry: Mapping[str, Mapping[str, Mapping[str, Figure]]]) -> dict[str, Any]:
    """`{first}-{second}` -> scorer -> metric -> interval of the difference on the same rows and resamples."""
    paired: dict[str, Any] = {}
    for first, second in PAIRS:
        if first not in geometry or second not in geometry:
            continue
        by_scorer = paired.setdefault(f"{first}-{second}", {})
        for scorer, named in geometry[first].items():
            chosen = {metric: named[metric] for metric in PAIRED_METRICS}
            differences = bootstrap.differences(chosen, geometry[second][scorer])
            by_scorer[scorer] = {name: interval.to_dict() for name, interval in differences.items()}
    return paired


def _agreement(by_scorer: Mapping[str, Mapping[str, Figure]]) -> dict[str, float | None]:
    """How far the two scorers say the same of single rows: equal 2-way outcomes, correlation of centred cosines.

    The correlation is None when a scorer says the same of every row.
    """
    first, second = (by_scorer[scorer] for scorer in SCORERS)
    pair = torch.stack([first["centred_cosine"].numerator, second["centred_cosine"].numerator])
    correlation = torch.corrcoef(pair)[0, 1].item()
    return {"top1": (first["top1"].numerator == second["top1"].numerator).double().mean().item(),
            "centred_cosine": correlation if correlation == correlation else None}


def _by_domain(evaluated: Evaluated, said: Mapping[str, Mapping[str, Figure]], resamples: int,
               seed: int) -> dict[str, Any]:
    """domain -> verbalizer -> precision and domain named, each over the documents of the domain."""
    table: dict[str, Any] = {}
    for domain in sorted(set(evaluated.domains)):
        rows = torch.tensor([row for row, own in enumerate(evaluated.domains) if own == domain])
        bootstrap = DocumentBootstrap([evaluated.doc_ids[row] for row in rows.tolist()], resamples, seed)
        table[domain] = {
            name: _intervals(bootstrap, {figure: said[name][figure].select(rows) for figure in _DOMAIN_FIGURES})
            for name in _BY_DOMAIN if name in said}
    return table


def _confusion(evaluated: Evaluated, verbalizer: str) -> dict[str, dict[str, int]]:
    """true domain -> domain named first (`none` when there is none) -> descriptions."""
    table: dict[str, Counter[str]] = {domain: Counter() for domain in sorted(set(evaluated.domains))}
    for domain, one in zip(evaluated.domains, evaluated.descriptions[verbalizer], strict=True):
        table[domain][claims.named_domain(one.text, evaluated.domain_names) or "none"] += 1
    return {domain: dict(sorted(counts.items())) for domain, counts in table.items()}
