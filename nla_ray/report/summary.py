"""From descriptions and what scorers read in them to the report's figures: one dictionary, every
number with its interval.

Pure: it knows neither models nor files. `results[verbalizer][scorer][metric]`,
`claims[verbalizer][figure]`, paired differences and ratios, agreement and gaps of the scorers,
figures by domain, by length and by number of choices, best of N, confidence, warnings and gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nla_ray.report.controls import SCORERS, TRAINED
from nla_ray.report.gates import Gate, judge_gate
from nla_ray.score import claims
from nla_ray.score.bootstrap import DocumentBootstrap
from nla_ray.score.choice import agreement, best_of
from nla_ray.score.metrics import Comparisons, Figure, figures, retrieval

if TYPE_CHECKING:
    from nla_ray.description.record import Description
    from nla_ray.report.readings import Readings


CLAIM_FIGURES = (
    "precision",
    "precision_shuffled",
    "precision_excess",
    "recall",
    "source_recall",
    "source_recall_shuffled",
    "hallucinated",
    "domain",
    "repeats",
    "distinct",
    "similarity",
    "top_line",
    "non_ascii",
    "unclosed",
    "empty",
    "tokens",
)
PREFIX_TOKENS = (4, 8, 16)
"""Lengths at which descriptions are cut for the prefix curve; its last point is the whole
description."""
_CURVE_METRICS = ("centred_cosine", "top1_10way")
_DOMAIN_CLAIMS = ("precision", "precision_shuffled", "hallucinated", "domain")
_DOMAIN_METRICS = ("centred_cosine", "top1", "top1_10way", "top1_10way_hard", "delta")
CONFIDENCE_METRICS = ("top1", "top1_10way", "centred_cosine")
_CONFIDENCE_BINS = 5
_SAMPLE_COUNTS = (1, 2, 4, 8, 16)
GAP_WARNING = 0.05
"""A gap between reward and judge scorer beyond the gold labels' by more than this, at the
interval's lower bound, is a warning.

Centred cosine. Optimising against the reward scorer must open some gap; what this catches is a
reward that nobody else sees.
"""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The test rows and everything that was said of them; every list has one entry a row."""

    doc_ids: Sequence[str]
    domains: Sequence[str]
    texts: Sequence[str]
    salient: Sequence[Sequence[str]]
    """The most salient words of each text."""
    comparisons: Comparisons
    descriptions: Mapping[str, Sequence[Description]]
    """By verbalizer."""
    readings: Readings
    """Of all `texts_to_read`."""
    domain_names: Mapping[str, str]
    """Slug -> the name a description may use."""
    samples: Sequence[Sequence[Description]] = ()
    """N samples of the arm of GRPO for each row; empty when none were drawn."""
    prefix_rows: Sequence[int] = ()
    """The rows whose descriptions are also read in part."""
    prefixes: Mapping[str, Mapping[int, Sequence[str]]]
    """Verbalizer -> number of tokens -> the descriptions of those rows cut to them."""
    sampled: str
    """The verbalizer that the samples are of."""

    @cached_property
    def geometry(self) -> dict[str, dict[str, dict[str, Figure]]]:
        """verbalizer -> scorer -> metric."""
        return {
            name: {
                scorer: figures(
                    self.read(scorer, [one.text for one in described]), self.comparisons
                )
                for scorer in SCORERS
            }
            for name, described in self.descriptions.items()
        }

    @cached_property
    def claims(self) -> dict[str, dict[str, Figure]]:
        """verbalizer -> figure of CLAIM_FIGURES."""
        return {name: claim_figures(self, name) for name in self.descriptions}

    def read(self, scorer: str, texts: Sequence[str]) -> Tensor:
        """Reconstructions [rows, d_model]."""
        return self.readings.of(scorer, texts)


def texts_to_read(
    descriptions: Mapping[str, Sequence[Description]],
    samples: Sequence[Sequence[Description]],
    prefixes: Mapping[str, Mapping[int, Sequence[str]]],
) -> set[str]:
    """Everything that the readings of an `Evaluated` must hold."""
    written = {
        form
        for described in descriptions.values()
        for one in described
        for form in forms_of(one.text)
    }
    cut = {
        text for by_length in prefixes.values() for texts in by_length.values() for text in texts
    }
    return written | cut | {one.text for drawn in samples for one in drawn}


def forms_of(text: str) -> tuple[str, str]:
    """A description whole, and with its quoted strings stripped."""
    return text, claims.strip_quotes(text)


def summarise(
    evaluated: Evaluated, gates: Sequence[Gate], resamples: int, seed: int
) -> dict[str, Any]:
    """Every figure of the report as plain JSON values."""
    bootstrap = DocumentBootstrap(evaluated.doc_ids, resamples, seed)
    summary: dict[str, Any] = {
        "n": len(evaluated.doc_ids),
        "documents": len(set(evaluated.doc_ids)),
        "chance": evaluated.comparisons.chances(),
        "results": {
            name: {scorer: _intervals(bootstrap, named) for scorer, named in by_scorer.items()}
            for name, by_scorer in evaluated.geometry.items()
        },
        "claims": {name: _intervals(bootstrap, named) for name, named in evaluated.claims.items()},
        **_pairs(bootstrap, evaluated),
        "agreement": {
            name: _agreement(by_scorer) for name, by_scorer in evaluated.geometry.items()
        },
        "gaps": _gaps(bootstrap, evaluated),
        "quotes": _quotes(bootstrap, evaluated),
        "prefix": _prefix_curves(evaluated, resamples, seed),
        "retrieval": _retrieval_curves(bootstrap, evaluated),
        **(_sampling(bootstrap, evaluated) if evaluated.samples else {}),
        "domains": _by_domain(evaluated, resamples, seed),
        "confusion": {name: _confusion(evaluated, name) for name in _spoken(evaluated)},
    }
    return {
        **summary,
        "warnings": _warnings(summary),
        "gates": [judge_gate(summary, gate) for gate in gates],
    }


def pairs_of(verbalizers: Sequence[str]) -> list[tuple[str, str]]:
    """Which verbalizers are compared row by row: both arms, with SFT and with the nearest label;
    every other one with them and with the others."""
    own = [
        ("grpo", "sft"),
        ("grpo", "nearest_train_label"),
        ("sft", "nearest_train_label"),
        ("grpo", "grpo_no_contrast"),
        ("grpo_no_contrast", "sft"),
    ]
    others = [name for name in verbalizers if name not in _OWN]
    more = [(name, known) for name in others for known in ("grpo", "sft", "nearest_train_label")]
    return [
        pair for pair in [*own, *more, *combinations(others, 2)] if set(pair) <= set(verbalizers)
    ]


_OWN = frozenset(
    (
        "gold",
        "nearest_train_label",
        "shuffled",
        "generic",
        "mean_activation",
        "random_vector",
        *TRAINED,
    )
)


def _spoken(evaluated: Evaluated) -> list[str]:
    """The verbalizers whose words are looked at closely: gold, what was trained, and what was named
    on the command line."""
    return [
        name for name in evaluated.descriptions if name in ("gold", *TRAINED) or name not in _OWN
    ]


# Claims -------------------------------------------------------------------------------------------


def claim_figures(evaluated: Evaluated, verbalizer: str) -> dict[str, Figure]:
    """The figures of CLAIM_FIGURES for one verbalizer. A description that claims nothing has
    precision and recall 0.

    `precision_shuffled`: against the text of the wrong row; `precision_excess`: the difference of
    the two. `recall`: share of the gold label's claims that are made too; `source_recall`: share of
    the text's most salient words that are named, and of the wrong row's. `hallucinated`: share of
    quoted strings, numbers, names and listed tokens that the text does not have, left out where
    none are told. `distinct`: distinct descriptions over descriptions; `similarity`: word overlap
    with the wrong row's description; `top_line`: share of the descriptions that have the line most
    of them have.
    """
    described = evaluated.descriptions[verbalizer]
    texts, wrong = [one.text for one in described], evaluated.comparisons.wrong.tolist()
    precision = torch.tensor(
        [claims.claim_precision(text, source) for text, source in zip(texts, evaluated.texts)],
        dtype=torch.float64,
    )
    elsewhere = torch.tensor(
        [claims.claim_precision(text, evaluated.texts[row]) for text, row in zip(texts, wrong)],
        dtype=torch.float64,
    )
    specifics = torch.tensor(
        [claims.missing_specifics(text, source) for text, source in zip(texts, evaluated.texts)],
        dtype=torch.float64,
    )
    copies = Counter(texts)
    lines = [set(claims.bullets(text)) for text in texts]
    [(top_line, _)] = Counter(line for own in lines for line in own).most_common(1) or [("", 0)]
    named = {
        "precision": Figure.mean(precision),
        "precision_shuffled": Figure.mean(elsewhere),
        "precision_excess": Figure.mean(precision - elsewhere),
        "recall": Figure.mean(
            [
                _recall(text, one.text)
                for text, one in zip(texts, evaluated.descriptions["gold"], strict=True)
            ]
        ),
        "source_recall": Figure.mean(
            [
                claims.source_recall(text, words)
                for text, words in zip(texts, evaluated.salient, strict=True)
            ]
        ),
        "source_recall_shuffled": Figure.mean(
            [claims.source_recall(text, evaluated.salient[row]) for text, row in zip(texts, wrong)]
        ),
        "hallucinated": Figure(specifics[:, 0], specifics[:, 1]),
        "domain": Figure.mean(
            [
                claims.domain_named(text, domain, evaluated.domain_names)
                for text, domain in zip(texts, evaluated.domains, strict=True)
            ]
        ),
        "repeats": Figure.mean([claims.repeats_item(text) for text in texts]),
        "distinct": Figure.mean([1.0 / copies[text] for text in texts]),
        "similarity": Figure.mean(
            [claims.similarity(text, texts[row]) for text, row in zip(texts, wrong)]
        ),
        "top_line": Figure.mean([top_line in own for own in lines]),
        "non_ascii": Figure.mean([claims.non_ascii_share(text) for text in texts]),
        "unclosed": Figure.mean([not one.closed for one in described]),
        "empty": Figure.mean([not one.text.strip() for one in described]),
        "tokens": Figure.mean([one.num_tokens for one in described]),
    }
    if not specifics[:, 1].any():
        del named["hallucinated"]
    return named


def _recall(description: str, gold: str) -> float:
    wanted = claims.salient_words(gold)
    return len(wanted & claims.salient_words(description)) / len(wanted) if wanted else 0.0


# Between verbalizers and between scorers ----------------------------------------------------------


def _pairs(bootstrap: DocumentBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """`paired`: `{first}-{second}` -> scorer or `claims` -> figure -> interval of the difference on
    the same rows and resamples. `ratios`: `{first}/{second}` -> scorer -> the ratio of the deltas,
    where the second one's is above 0.
    """
    paired: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for first, second in pairs_of(list(evaluated.descriptions)):
        by_scorer = paired[f"{first}-{second}"] = {}
        for scorer in SCORERS:
            ours, theirs = evaluated.geometry[first][scorer], evaluated.geometry[second][scorer]
            by_scorer[scorer] = _dicts(bootstrap.differences(ours, theirs))
            if theirs["delta"].value > 0:
                ratios.setdefault(f"{first}/{second}", {})[scorer] = _dicts(
                    bootstrap.ratios({"delta": ours["delta"]}, theirs)
                )
        ours, theirs = evaluated.claims[first], evaluated.claims[second]
        by_scorer["claims"] = _dicts(
            bootstrap.differences({name: ours[name] for name in ours if name in theirs}, theirs)
        )
    return {"paired": paired, "ratios": ratios}


def _agreement(by_scorer: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, float | None]]:
    """How far two scorers say the same of single rows, by pair: equal 2-way outcomes, correlation
    of centred cosines.

    The correlation is None when a scorer says the same of every row.
    """
    told: dict[str, dict[str, float | None]] = {}
    for first, second in combinations(by_scorer, 2):
        one, other = by_scorer[first], by_scorer[second]
        correlation = torch.corrcoef(
            torch.stack([one["centred_cosine"].numerator, other["centred_cosine"].numerator])
        )[0, 1].item()
        told[f"{first}/{second}"] = {
            "top1": (one["top1"].numerator == other["top1"].numerator).double().mean().item(),
            "centred_cosine": correlation if correlation == correlation else None,
        }
    return told


def _gaps(bootstrap: DocumentBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> by how much the reward scorer's centred cosine exceeds the judge's, beyond what
    it does for the gold labels."""
    gaps = {
        name: Figure.mean(
            by_scorer["reward"]["centred_cosine"].numerator
            - by_scorer["judge"]["centred_cosine"].numerator
        )
        for name, by_scorer in evaluated.geometry.items()
    }
    gold = gaps.pop("gold")
    return _dicts(bootstrap.differences(gaps, dict.fromkeys(gaps, gold)))


def _quotes(bootstrap: DocumentBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> share of descriptions that quote, and by scorer what is lost when what they
    quote is taken out."""
    told: dict[str, Any] = {}
    for name, described in evaluated.descriptions.items():
        quoting = [claims.quotes_something(one.text) for one in described]
        if not any(quoting):
            continue
        stripped = [claims.strip_quotes(one.text) for one in described]
        told[name] = {"quoting": _intervals(bootstrap, {"share": Figure.mean(quoting)})["share"]}
        for scorer in SCORERS:
            without = figures(evaluated.read(scorer, stripped), evaluated.comparisons)
            chosen = {metric: evaluated.geometry[name][scorer][metric] for metric in _CURVE_METRICS}
            told[name][scorer] = _dicts(bootstrap.differences(chosen, without))
    return told


# Curves -------------------------------------------------------------------------------------------


def _prefix_curves(evaluated: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """verbalizer -> scorer -> [{tokens, centred_cosine, top1_10way}] for descriptions cut to so
    many tokens; the last is whole."""
    if not evaluated.prefixes:
        return {}
    rows = torch.tensor(evaluated.prefix_rows)
    comparisons = evaluated.comparisons.at(rows)
    bootstrap = DocumentBootstrap(
        [evaluated.doc_ids[row] for row in evaluated.prefix_rows], resamples, seed
    )
    curves: dict[str, Any] = {}
    for name, by_length in evaluated.prefixes.items():
        whole = [evaluated.descriptions[name][row] for row in evaluated.prefix_rows]
        mean_length = round(sum(one.num_tokens for one in whole) / len(whole))
        points = {
            **{length: texts for length, texts in by_length.items() if length < mean_length},
            mean_length: [one.text for one in whole],
        }
        for scorer in SCORERS:
            curve = curves.setdefault(name, {}).setdefault(scorer, [])
            for tokens, texts in points.items():
                named = figures(evaluated.read(scorer, texts), comparisons)
                curve.append(
                    {
                        "tokens": tokens,
                        **_intervals(
                            bootstrap, {metric: named[metric] for metric in _CURVE_METRICS}
                        ),
                    }
                )
    return curves


def _retrieval_curves(bootstrap: DocumentBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> scorer -> [{k, top1}]: the share of rows found among k activations by centred
    cosine."""
    curves: dict[str, Any] = {}
    for name, described in evaluated.descriptions.items():
        for scorer in SCORERS:
            found = retrieval(
                evaluated.read(scorer, [one.text for one in described]), evaluated.comparisons
            )
            intervals = _intervals(bootstrap, {str(size): figure for size, figure in found.items()})
            curves.setdefault(name, {})[scorer] = [
                {"k": int(size), "top1": figure} for size, figure in intervals.items()
            ]
    return curves


# Samples ------------------------------------------------------------------------------------------


def _sampling(bootstrap: DocumentBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """What N samples are good for: `best_of` N by the reward scorer, and `confidence`, their
    agreement, with its `calibration`."""
    comparisons, count = evaluated.comparisons, len(evaluated.samples[0])
    flat = [one.text for drawn in evaluated.samples for one in drawn]
    read = {
        scorer: evaluated.read(scorer, flat).reshape(len(evaluated.samples), count, -1)
        for scorer in SCORERS
    }
    rows = torch.arange(len(comparisons))
    best = []
    for samples in (size for size in _SAMPLE_COUNTS if size <= count):
        chosen = best_of(read["reward"][:, :samples], comparisons.originals, comparisons.mean)
        named = {scorer: figures(read[scorer][rows, chosen], comparisons) for scorer in SCORERS}
        best.append(
            {
                "samples": samples,
                **{
                    scorer: _intervals(
                        bootstrap, {metric: own[metric] for metric in CONFIDENCE_METRICS}
                    )
                    for scorer, own in named.items()
                },
            }
        )
    confidence = agreement(read["reward"], comparisons.mean) if count > 1 else None
    return {
        "best_of": best,
        **({} if confidence is None else _confidence(bootstrap, evaluated, confidence, count)),
    }


def _confidence(
    bootstrap: DocumentBootstrap, evaluated: Evaluated, confidence: Tensor, samples: int
) -> dict[str, Any]:
    """`confidence`: the greedy description's figures on the more confident half of the rows, less
    those on the rest, by scorer; `calibration`: the judge's figures by quantile of the
    confidence."""
    order = confidence.argsort(stable=True)
    upper = torch.zeros(len(order), dtype=torch.float64)
    upper[order[len(order) // 2 :]] = 1.0
    halves: dict[str, Any] = {"samples": samples}
    for scorer in SCORERS:
        named = {
            metric: evaluated.geometry[evaluated.sampled][scorer][metric].numerator
            for metric in CONFIDENCE_METRICS
        }
        halves[scorer] = _dicts(
            bootstrap.differences(
                {name: Figure(value * upper, upper) for name, value in named.items()},
                {name: Figure(value * (1 - upper), 1 - upper) for name, value in named.items()},
            )
        )
    judged = evaluated.geometry[evaluated.sampled]["judge"]
    bins = []
    for rows in order.tensor_split(_CONFIDENCE_BINS):
        inside = torch.zeros(len(order), dtype=torch.float64)
        inside[rows] = 1.0
        intervals = _intervals(
            bootstrap,
            {
                f"judge_{metric}": Figure(judged[metric].numerator * inside, inside)
                for metric in CONFIDENCE_METRICS
            },
        )
        bins.append(
            {
                "confidence_low": confidence[rows].min().item(),
                "confidence_high": confidence[rows].max().item(),
                **intervals,
            }
        )
    halves["rank_correlation"] = rank_correlation(confidence, judged["centred_cosine"].numerator)
    return {"confidence": halves, "calibration": bins}


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of the ranks; equal values share the mean of theirs."""
    return torch.corrcoef(torch.stack([_mean_ranks(values) for values in (first, second)]))[
        0, 1
    ].item()


def _mean_ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


# By domain ----------------------------------------------------------------------------------------


def _by_domain(evaluated: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """domain -> verbalizer -> claims, and every scorer's figures as `{scorer}.{metric}`, each over
    the documents of the domain."""
    table: dict[str, Any] = {}
    for domain in sorted(set(evaluated.domains)):
        rows = torch.tensor([row for row, own in enumerate(evaluated.domains) if own == domain])
        bootstrap = DocumentBootstrap(
            [evaluated.doc_ids[row] for row in rows.tolist()], resamples, seed
        )
        table[domain] = {}
        for name in evaluated.descriptions:
            chosen = {
                figure: evaluated.claims[name][figure].select(rows)
                for figure in _DOMAIN_CLAIMS
                if figure in evaluated.claims[name]
            }
            chosen |= {
                f"{scorer}.{metric}": evaluated.geometry[name][scorer][metric].select(rows)
                for scorer in SCORERS
                for metric in _DOMAIN_METRICS
            }
            told = {figure: value for figure, value in chosen.items() if value.denominator.any()}
            table[domain][name] = _intervals(bootstrap, told)
    return table


def _confusion(evaluated: Evaluated, verbalizer: str) -> dict[str, dict[str, int]]:
    """true domain -> domain named first (`none` when there is none) -> descriptions."""
    table: dict[str, Counter[str]] = {
        domain: Counter() for domain in sorted(set(evaluated.domains))
    }
    for domain, one in zip(evaluated.domains, evaluated.descriptions[verbalizer], strict=True):
        table[domain][claims.named_domain(one.text, evaluated.domain_names) or "none"] += 1
    return {domain: dict(sorted(counts.items())) for domain, counts in table.items()}


# Warnings -----------------------------------------------------------------------------------------


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any figure, in words."""
    return [
        f"{name}: the reward scorer's centred cosine exceeds the judge's by {gap['value']:.3f}"
        f" [{gap['low']:.3f}, {gap['high']:.3f}] more than for the gold labels: what the reward"
        " scorer sees there the judge does not. Reward hacking is likely."
        for name, gap in summary["gaps"].items()
        if gap["low"] > GAP_WARNING
    ]


def _intervals(
    bootstrap: DocumentBootstrap, named: Mapping[str, Figure]
) -> dict[str, dict[str, float | int]]:
    return _dicts(bootstrap.intervals(named))


def _dicts(intervals: Mapping[str, Any]) -> dict[str, dict[str, float | int]]:
    return {name: interval.to_dict() for name, interval in intervals.items()}
