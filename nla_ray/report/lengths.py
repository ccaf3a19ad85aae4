"""What is left of a difference when both descriptions of an activation are equally long.

A longer description says more, so it may win by its length alone. Twice that is taken away: each
of two descriptions is cut to the tokens of the shorter one; and rows are kept where the two are of
about the same length as they are. It knows neither models nor files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nla_ray.base.encoding import encode_texts
from nla_ray.description.record import Description
from nla_ray.report.claim_figures import CLAIM_FIGURES, ClaimRows
from nla_ray.report.controls import CONTROLS
from nla_ray.report.evaluated import Evaluated
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.metrics import Figure, figures

_METRICS = ("centred_cosine", "top1_10way", "top1_10way_hard")
_CLAIMS = ("precision", "precision_excess", "source_recall")
_TOLERANCE = 0.1
"""Of the shorter description's length: lengths that differ by no more are matched."""
_Pair = tuple[str, str]
_Named = Mapping[str, Mapping[str, Figure]]
"""scorer or `claims` -> figure."""


def cut_texts(tokenizer: Any, texts: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """The first tokens of each text, as many as `lengths` says; a cut character is left out."""
    cut = []
    for text, ids, length in zip(texts, encode_texts(tokenizer, texts), lengths, strict=True):
        kept = tokenizer.decode(ids[:length], skip_special_tokens=True).rstrip("\ufffd")
        cut.append(text if len(ids) <= length else kept)
    return cut


def cut_pairs(
    tokenizer: Any, descriptions: Mapping[str, Sequence[Description]], pairs: Sequence[_Pair]
) -> dict[_Pair, tuple[list[Description], list[Description]]]:
    """Both descriptions of every row cut to the shorter one's tokens, by pair of verbalizers.

    Pairs with a control are left out: a control wins nothing that has to be explained.
    """
    return {
        pair: _cut_pair(tokenizer, *(descriptions[name] for name in pair))
        for pair in pairs
        if set(pair).isdisjoint(CONTROLS)
    }


def _cut_pair(
    tokenizer: Any, first: Sequence[Description], second: Sequence[Description]
) -> tuple[list[Description], list[Description]]:
    lengths = [min(_length(a), _length(b)) for a, b in zip(first, second, strict=True)]
    cut = []
    for described in (first, second):
        texts = cut_texts(tokenizer, [description.text for description in described], lengths)
        cut.append(
            [
                dataclasses.replace(description, text=text, num_tokens=length)
                for description, text, length in zip(described, texts, lengths, strict=True)
            ]
        )
    return cut[0], cut[1]


def length_section(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """`{first}-{second}` -> `whole`, `cut` and `matched` -> the difference at these lengths.

    Each has `tokens` (the mean length of the first, of the second), and scorer or `claims` ->
    figure. `matched` is left out where no row is.
    """
    section: dict[str, Any] = {}
    named = {name: _named(evaluated, name) for name in {*chain.from_iterable(evaluated.cut)}}
    for pair, cut in evaluated.cut.items():
        whole = [named[name] for name in pair]
        lengths = [_lengths(evaluated.descriptions[name]) for name in pair]
        equal = dataclasses.replace(evaluated, descriptions=dict(zip(pair, cut, strict=True)))
        views = {"whole": (whole, lengths, torch.ones(bootstrap.rows))}
        cut_lengths = [_lengths(described) for described in cut]
        views["cut"] = ([_named(equal, name) for name in pair], cut_lengths, views["whole"][2])
        matched = _matched(*lengths)
        if matched.any():
            views["matched"] = (whole, lengths, matched)
        section["-".join(pair)] = {
            view: _differences(bootstrap, *of_view) for view, of_view in views.items()
        }
    return section


def _length(description: Description) -> int:
    return description.num_tokens or 0


def _lengths(descriptions: Sequence[Description]) -> Tensor:
    return torch.tensor([_length(description) for description in descriptions]).double()


def _matched(first: Tensor, second: Tensor) -> Tensor:
    """1 for a row whose two lengths [rows] are about the same, else 0."""
    allowed = _TOLERANCE * torch.minimum(first, second)
    return ((first - second).abs() <= allowed).double()


def _named(evaluated: Evaluated, verbalizer: str) -> _Named:
    """The figures that are compared at equal length."""
    texts, rows = evaluated.texts_of(verbalizer), ClaimRows(evaluated, verbalizer)
    named: dict[str, dict[str, Figure]] = {}
    for scorer in evaluated.readings.scorers:
        found = figures(evaluated.read(scorer, texts), evaluated.comparisons)
        named[scorer] = {metric: found[metric] for metric in _METRICS}
    named["claims"] = {name: CLAIM_FIGURES[name](rows) for name in _CLAIMS}
    return named


def _differences(
    bootstrap: FamilyBootstrap, named: Sequence[_Named], lengths: Sequence[Tensor], rows: Tensor
) -> dict[str, Any]:
    """First less second over some rows: `rows` [rows] has 1 for these, 0 for the others."""
    first, second = named
    means = bootstrap.intervals(
        {str(number): _over(Figure.mean(length), rows) for number, length in enumerate(lengths)}
    )
    differences: dict[str, Any] = {"tokens": list(means.values())}
    for scorer in first:
        pair = [
            {name: _over(figure, rows) for name, figure in of_verbalizer[scorer].items()}
            for of_verbalizer in (first, second)
        ]
        differences[scorer] = bootstrap.differences(*pair)
    return differences


def _over(figure: Figure, rows: Tensor) -> Figure:
    return Figure(figure.numerator * rows, figure.denominator * rows)
