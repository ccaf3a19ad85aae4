"""What a verbalizer's descriptions claim, as figures: CLAIM_FIGURES has one function a figure.

Pure: string work of `score/claims.py` on descriptions and texts, one value a row. It knows neither
models nor scorers. Protects the rule that every description counts: the empty description has
precision and recall 0. To add a figure, write its function and its line in CLAIM_FIGURES; how a
figure is shown is in `rendering/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nla_ray.score import claims
from nla_ray.score.metrics import Figure

if TYPE_CHECKING:
    from nla_ray.report.evaluated import Evaluated


class ClaimRows:
    """One verbalizer's descriptions, row by row, and what their claims are compared with."""

    def __init__(self, evaluated: Evaluated, verbalizer: str) -> None:
        self.evaluated = evaluated
        self.descriptions = evaluated.descriptions[verbalizer]
        self.texts = evaluated.texts_of(verbalizer)

    @cached_property
    def wrong_rows(self) -> list[int]:
        """The row of another document that each row is compared with."""
        return self.evaluated.comparisons.wrong.tolist()

    @cached_property
    def precision(self) -> Tensor:
        """Share of a description's claims that its text bears out: [rows] float64."""
        return self._precision_in(self.evaluated.texts)

    @cached_property
    def precision_shuffled(self) -> Tensor:
        """Share of a description's claims that the wrong row's text bears out: [rows] float64."""
        return self._precision_in([self.evaluated.texts[row] for row in self.wrong_rows])

    def _precision_in(self, sources: Sequence[str]) -> Tensor:
        pairs = zip(self.texts, sources, strict=True)
        values = [claims.claim_precision(text, source) for text, source in pairs]
        return torch.tensor(values, dtype=torch.float64)


def claim_figures(evaluated: Evaluated, verbalizer: str) -> dict[str, Figure]:
    """The figures of CLAIM_FIGURES for one verbalizer.

    A figure that no row has a value of is left out: `hallucinated`, where nothing specific is said.
    """
    rows = ClaimRows(evaluated, verbalizer)
    named = {name: figure(rows) for name, figure in CLAIM_FIGURES.items()}
    return {name: figure for name, figure in named.items() if figure.denominator.any()}


def _precision(rows: ClaimRows) -> Figure:
    """Mean share of claims that the text bears out."""
    return Figure.mean(rows.precision)


def _precision_shuffled(rows: ClaimRows) -> Figure:
    """The same share against the text of the wrong row: what is true of any text."""
    return Figure.mean(rows.precision_shuffled)


def _precision_excess(rows: ClaimRows) -> Figure:
    """Precision less shuffled precision."""
    return Figure.mean(rows.precision - rows.precision_shuffled)


def _recall(rows: ClaimRows) -> Figure:
    """Mean share of the gold label's claims that the description makes too."""
    gold = rows.evaluated.texts_of("gold")
    pairs = zip(rows.texts, gold, strict=True)
    return Figure.mean([_gold_recall(text, label) for text, label in pairs])


def _gold_recall(description: str, gold: str) -> float:
    wanted = claims.claimed_words(gold)
    return len(wanted & claims.claimed_words(description)) / len(wanted) if wanted else 0.0


def _source_recall(rows: ClaimRows) -> Figure:
    """Mean share of the text's most salient words that the description names."""
    pairs = zip(rows.texts, rows.evaluated.salient, strict=True)
    return Figure.mean([claims.source_recall(text, words) for text, words in pairs])


def _source_recall_shuffled(rows: ClaimRows) -> Figure:
    """The same share of the wrong row's most salient words."""
    salient = [rows.evaluated.salient[row] for row in rows.wrong_rows]
    pairs = zip(rows.texts, salient, strict=True)
    return Figure.mean([claims.source_recall(text, words) for text, words in pairs])


def _hallucinated(rows: ClaimRows) -> Figure:
    """Share of quoted strings, numbers, names and listed tokens that the text does not have."""
    pairs = zip(rows.texts, rows.evaluated.texts, strict=True)
    counts = [claims.missing_specifics(text, source) for text, source in pairs]
    missing, specific = torch.tensor(counts, dtype=torch.float64).unbind(1)
    return Figure(missing, specific)


def _domain(rows: ClaimRows) -> Figure:
    """Share of descriptions that name the text's domain, and no other first."""
    names = rows.evaluated.domain_names
    pairs = zip(rows.texts, rows.evaluated.domains, strict=True)
    return Figure.mean([claims.domain_named(text, domain, names) for text, domain in pairs])


def _repeats(rows: ClaimRows) -> Figure:
    """Share of descriptions that list an item twice."""
    return Figure.mean([claims.repeats_item(text) for text in rows.texts])


def _distinct(rows: ClaimRows) -> Figure:
    """Distinct descriptions over descriptions."""
    copies = Counter(rows.texts)
    return Figure.mean([1.0 / copies[text] for text in rows.texts])


def _similarity(rows: ClaimRows) -> Figure:
    """Mean word overlap with the wrong row's description."""
    pairs = zip(rows.texts, rows.wrong_rows, strict=True)
    return Figure.mean([claims.similarity(text, rows.texts[row]) for text, row in pairs])


def _top_line(rows: ClaimRows) -> Figure:
    """Share of descriptions that have the line which most descriptions have."""
    lines_by_row = [set(claims.bullets(text)) for text in rows.texts]
    counts = Counter(line for lines in lines_by_row for line in lines)
    [(top_line, _)] = counts.most_common(1) or [("", 0)]
    return Figure.mean([top_line in lines for lines in lines_by_row])


def _non_ascii(rows: ClaimRows) -> Figure:
    """Mean share of characters outside ASCII."""
    return Figure.mean([claims.non_ascii_share(text) for text in rows.texts])


def _unclosed(rows: ClaimRows) -> Figure:
    """Share of descriptions that ran into the token limit before their closing tag."""
    return Figure.mean([not description.closed for description in rows.descriptions])


def _empty(rows: ClaimRows) -> Figure:
    """Share of descriptions without a visible character."""
    return Figure.mean([not text.strip() for text in rows.texts])


def _tokens(rows: ClaimRows) -> Figure:
    """Mean length in tokens."""
    return Figure.mean([description.num_tokens for description in rows.descriptions])


CLAIM_FIGURES: dict[str, Callable[[ClaimRows], Figure]] = {
    "precision": _precision,
    "precision_shuffled": _precision_shuffled,
    "precision_excess": _precision_excess,
    "recall": _recall,
    "source_recall": _source_recall,
    "source_recall_shuffled": _source_recall_shuffled,
    "hallucinated": _hallucinated,
    "domain": _domain,
    "repeats": _repeats,
    "distinct": _distinct,
    "similarity": _similarity,
    "top_line": _top_line,
    "non_ascii": _non_ascii,
    "unclosed": _unclosed,
    "empty": _empty,
    "tokens": _tokens,
}
"""Every figure of what descriptions claim, in the order of the report."""
