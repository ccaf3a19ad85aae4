"""The report's figures as one dictionary, every number with its interval.

Pure: it knows neither models nor files. `results[verbalizer][scorer][metric]`,
`claims[verbalizer][figure]`, paired differences and ratios, agreement and gaps of the scorers,
figures by domain, by length and by number of choices, best of N, confidence, warnings and gates. To
add a section, write its function and its line in `summarise`. The figures themselves come from
`score/metrics.py` (a scorer's), `claim_figures.py` (a description's claims) and `samples.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from nla_ray.report.claim_confidence import claim_confidence_section
from nla_ray.report.controls import CONTROLS, SCORERS, SOURCE
from nla_ray.report.differences import difference_section
from nla_ray.report.evaluated import Evaluated
from nla_ray.report.gates import Gate, judge_gate
from nla_ray.report.layers import layer_section
from nla_ray.report.lengths import length_section
from nla_ray.report.matched import probe_section, word_curve
from nla_ray.report.refreshed import two_by_two
from nla_ray.report.samples import sample_sections
from nla_ray.report.wording import wording_section
from nla_ray.score import claims
from nla_ray.score.bootstrap import FamilyBootstrap, Interval
from nla_ray.score.metrics import Figure, chances, figures, retrieval

PREFIX_TOKENS = (4, 8, 16)
"""Lengths at which descriptions are cut for the prefix curve. Its last point is the whole text."""
_CURVE_METRICS = ("centred_cosine", "top1_10way")
_DOMAIN_CLAIMS = ("precision", "precision_shuffled", "hallucinated", "domain")
_DOMAIN_METRICS = ("centred_cosine", "top1", "top1_10way", "top1_10way_hard", "delta")
GAP_WARNING = 0.05
"""Of centred cosine: a gap between reward and judge scorer that is larger than this is a warning.

It is the gap beyond that of the gold labels, at the interval's lower bound. Optimising against the
reward scorer must open some gap. What this catches is a reward that no other scorer sees.
"""


def summarise(
    evaluated: Evaluated, gates: Sequence[Gate], resamples: int, seed: int
) -> dict[str, Any]:
    """Every figure of the report as plain JSON values."""
    bootstrap = FamilyBootstrap(evaluated.family_ids, resamples, seed)
    where_asked = {
        "differences": difference_section(evaluated, resamples, seed),
        "layers": layer_section(bootstrap, evaluated),
    }
    summary = _as_json(
        {
            "n": len(evaluated.doc_ids),
            "documents": len(set(evaluated.doc_ids)),
            "families": len(set(evaluated.family_ids)),
            "chance": chances(evaluated.comparisons),
            "results": _results(bootstrap, evaluated),
            "claims": _claims(bootstrap, evaluated),
            "paired": _paired_differences(bootstrap, evaluated),
            "ratios": _ratios(bootstrap, evaluated),
            "agreement": _agreement(evaluated),
            "gaps": _gaps(bootstrap, evaluated),
            "quotes": _quotes(bootstrap, evaluated),
            "prefix": _prefix_curves(evaluated, resamples, seed),
            "lengths": length_section(bootstrap, evaluated),
            "refreshed": two_by_two(bootstrap, evaluated),
            "wording": wording_section(evaluated, resamples, seed),
            "probe": probe_section(bootstrap, evaluated),
            "word_curve": word_curve(bootstrap, evaluated),
            "claim_confidence": claim_confidence_section(bootstrap, evaluated.judged_claims),
            "retrieval": _retrieval_curves(bootstrap, evaluated),
            **(sample_sections(bootstrap, evaluated) if evaluated.samples else {}),
            **{name: section for name, section in where_asked.items() if section},
            "domains": _by_domain(evaluated, resamples, seed),
            "confusion": _confusion(evaluated),
        }
    )
    return {
        **summary,
        "warnings": _warnings(summary),
        "gates": [judge_gate(summary, gate) for gate in gates],
    }


def _as_json(value: Any) -> Any:
    """Intervals become dictionaries, all through a section."""
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list) else value


def _results(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> scorer -> metric."""
    return {
        name: {scorer: bootstrap.intervals(named) for scorer, named in by_scorer.items()}
        for name, by_scorer in evaluated.geometry.items()
    }


def _claims(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> figure of CLAIM_FIGURES."""
    return {name: bootstrap.intervals(named) for name, named in evaluated.claims.items()}


# Between verbalizers and between scorers ----------------------------------------------------------


def _paired_differences(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """`{first}-{second}` -> scorer or `claims` -> figure: first less second.

    Differences on the same rows and resamples.
    """
    paired: dict[str, Any] = {}
    for first, second in evaluated.pairs:
        by_scorer: dict[str, Any] = {}
        for scorer in SCORERS:
            by_scorer[scorer] = bootstrap.differences(
                evaluated.geometry[first][scorer], evaluated.geometry[second][scorer]
            )
        ours, theirs = evaluated.claims[first], evaluated.claims[second]
        shared = {name: figure for name, figure in ours.items() if name in theirs}
        by_scorer["claims"] = bootstrap.differences(shared, theirs)
        paired[f"{first}-{second}"] = by_scorer
    return paired


def _ratios(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """`{first}/{second}` -> scorer -> `delta`: the ratio of the two, where second's is above 0."""
    ratios: dict[str, Any] = {}
    for first, second in evaluated.pairs:
        by_scorer = {}
        for scorer in SCORERS:
            ours = evaluated.geometry[first][scorer]["delta"]
            theirs = evaluated.geometry[second][scorer]["delta"]
            if theirs.value > 0:
                by_scorer[scorer] = bootstrap.ratios({"delta": ours}, {"delta": theirs})
        if by_scorer:
            ratios[f"{first}/{second}"] = by_scorer
    return ratios


def _agreement(evaluated: Evaluated) -> dict[str, dict[str, dict[str, float | None]]]:
    """verbalizer -> `{first}/{second}` -> how far two scorers say the same of single rows.

    `top1`: share of equal 2-way outcomes. `centred_cosine`: correlation; None when a scorer says
    the same of every row.
    """
    return {
        name: {
            f"{first}/{second}": _agreement_of(by_scorer[first], by_scorer[second])
            for first, second in combinations(by_scorer, 2)
        }
        for name, by_scorer in evaluated.geometry.items()
    }


def _agreement_of(
    first: Mapping[str, Figure], second: Mapping[str, Figure]
) -> dict[str, float | None]:
    cosines = [named["centred_cosine"].numerator for named in (first, second)]
    correlation = torch.corrcoef(torch.stack(cosines))[0, 1].item()
    same_choice = first["top1"].numerator == second["top1"].numerator
    return {
        "top1": same_choice.double().mean().item(),
        "centred_cosine": None if math.isnan(correlation) else correlation,
    }


def _gaps(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Interval]:
    """verbalizer -> the reward scorer's centred cosine less the judge's, gold's gap taken out."""
    gaps = {
        name: Figure.mean(
            by_scorer["reward"]["centred_cosine"].numerator
            - by_scorer["judge"]["centred_cosine"].numerator
        )
        for name, by_scorer in evaluated.geometry.items()
    }
    gold = gaps.pop("gold")
    return bootstrap.differences(gaps, dict.fromkeys(gaps, gold))


def _quotes(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> `quoting`, and scorer -> what is lost without what the descriptions quote.

    `quoting`: share of descriptions that quote. A verbalizer that never quotes is left out, and so
    is the source text.
    """
    quotes: dict[str, Any] = {}
    for name, by_scorer in evaluated.geometry.items():
        if name == SOURCE:
            continue
        texts = evaluated.texts_of(name)
        quoting = [claims.quotes_something(text) for text in texts]
        if not any(quoting):
            continue
        stripped = [claims.strip_quotes(text) for text in texts]
        quotes[name] = bootstrap.intervals({"quoting": Figure.mean(quoting)})
        for scorer, named in by_scorer.items():
            without = figures(evaluated.read(scorer, stripped), evaluated.comparisons)
            whole = {metric: named[metric] for metric in _CURVE_METRICS}
            quotes[name][scorer] = bootstrap.differences(whole, without)
    return quotes


# Curves -------------------------------------------------------------------------------------------


def _prefix_curves(evaluated: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """verbalizer -> scorer -> [{tokens, centred_cosine, top1_10way}] of shortened descriptions.

    A point a length in tokens; the last is the whole description, at the mean length.
    """
    if not evaluated.prefixes:
        return {}
    comparisons = evaluated.comparisons.at(torch.tensor(evaluated.prefix_rows))
    bootstrap = FamilyBootstrap(
        [evaluated.family_ids[row] for row in evaluated.prefix_rows], resamples, seed
    )
    curves: dict[str, Any] = {}
    for name, by_length in evaluated.prefixes.items():
        whole = [evaluated.descriptions[name][row] for row in evaluated.prefix_rows]
        mean_length = round(sum(description.num_tokens for description in whole) / len(whole))
        points = {length: texts for length, texts in by_length.items() if length < mean_length}
        points[mean_length] = [description.text for description in whole]
        curves[name] = {scorer: [] for scorer in SCORERS}
        for scorer, curve in curves[name].items():
            for tokens, texts in points.items():
                named = figures(evaluated.read(scorer, texts), comparisons)
                wanted = {metric: named[metric] for metric in _CURVE_METRICS}
                curve.append({"tokens": tokens, **bootstrap.intervals(wanted)})
    return curves


def _retrieval_curves(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> scorer -> [{k, top1}]: share of rows found among k, by centred cosine."""
    curves: dict[str, Any] = {}
    for name in evaluated.descriptions:
        texts = evaluated.texts_of(name)
        curves[name] = {}
        for scorer in SCORERS:
            found = retrieval(evaluated.read(scorer, texts), evaluated.comparisons)
            intervals = bootstrap.intervals({str(size): figure for size, figure in found.items()})
            curves[name][scorer] = [
                {"k": int(size), "top1": interval} for size, interval in intervals.items()
            ]
    return curves


# By domain ----------------------------------------------------------------------------------------


def _by_domain(evaluated: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """domain -> verbalizer -> claims, and every scorer's figures as `{scorer}.{metric}`.

    Each is over the rows of the domain. A figure that none of them has a value of is left out.
    """
    table: dict[str, Any] = {}
    for domain in sorted(set(evaluated.domains)):
        rows = [row for row, row_domain in enumerate(evaluated.domains) if row_domain == domain]
        bootstrap = FamilyBootstrap([evaluated.family_ids[row] for row in rows], resamples, seed)
        table[domain] = {}
        for name in evaluated.descriptions:
            named = _domain_figures(evaluated, name)
            chosen = {key: figure.select(torch.tensor(rows)) for key, figure in named.items()}
            defined = {key: figure for key, figure in chosen.items() if figure.denominator.any()}
            table[domain][name] = bootstrap.intervals(defined)
    return table


def _domain_figures(evaluated: Evaluated, verbalizer: str) -> dict[str, Figure]:
    """The figures of one verbalizer that are shown by domain, still over all rows."""
    named = evaluated.claims[verbalizer]
    chosen = {figure: named[figure] for figure in _DOMAIN_CLAIMS if figure in named}
    for scorer in SCORERS:
        for metric in _DOMAIN_METRICS:
            chosen[f"{scorer}.{metric}"] = evaluated.geometry[verbalizer][scorer][metric]
    return chosen


def _confusion(evaluated: Evaluated) -> dict[str, dict[str, dict[str, int]]]:
    """verbalizer -> true domain -> domain named first -> descriptions; controls are left out.

    `none`: the description names no domain.
    """
    table: dict[str, Any] = {}
    for name in evaluated.descriptions:
        if name in CONTROLS:
            continue
        counts = {domain: Counter[str]() for domain in sorted(set(evaluated.domains))}
        for domain, text in zip(evaluated.domains, evaluated.texts_of(name), strict=True):
            counts[domain][claims.named_domain(text, evaluated.domain_names) or "none"] += 1
        table[name] = {domain: dict(sorted(row.items())) for domain, row in counts.items()}
    return table


# Warnings -----------------------------------------------------------------------------------------


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any figure, in words."""
    return [*_gap_warnings(summary), *_probe_warnings(summary)]


def _gap_warnings(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: the reward scorer's centred cosine exceeds the judge's by {gap['value']:.3f}"
        f" [{gap['low']:.3f}, {gap['high']:.3f}] more than for the gold labels: what the reward"
        " scorer sees there the judge does not. Reward hacking is likely."
        for name, gap in summary["gaps"].items()
        if gap["low"] > GAP_WARNING and name not in CONTROLS
    ]


def _probe_warnings(summary: Mapping[str, Any]) -> list[str]:
    warnings = []
    for name, named in summary["probe"].items():
        difference = named["difference"]
        if difference["high"] < 0 and name != "gold":
            warnings.append(
                f"{name}: of the words it claims {named['precision']['value']:.3f} are in the text,"
                f" of as many words of a linear probe {named['probe_precision']['value']:.3f}"
                f" (difference [{difference['low']:.3f}, {difference['high']:.3f}]): it has not"
                " read what is there."
            )
    return warnings
