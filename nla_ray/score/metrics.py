"""The figures of a verbalizer under a scorer, as values per row.

To add a metric, add a row to METRICS: the report shows it under its name, or under a title of
`report/rendering/vocabulary.py`. Pure arithmetic on reconstructions and originals: it knows neither
text nor files, so training's monitor may call it too. `comparisons` says
what each row is compared with; `bootstrap` makes the intervals.
Source: the evaluation definitions; notation as in `activation.vectors`, v' a wrong row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.activation.vectors import norm
from nla_ray.score.comparisons import MOST_OTHERS, NUM_OTHERS, Comparisons, beaten_by, ranks

RETRIEVAL_SIZES = (2, 3, 5, 10, 20, 50, 100)
"""Sizes k of the k-way choices that make the retrieval curve."""
_ROUNDING = 1e-6
"""Lengths that differ by a smaller share are equal."""


@dataclass(frozen=True)
class Figure:
    """sum(numerator) / sum(denominator) over rows: computable on any resample of documents.

    Four answers, three of them right:

    >>> Figure(numerator=torch.tensor([1.0, 1.0, 0.0, 1.0]), denominator=torch.ones(4)).value
    0.75
    """

    numerator: Tensor
    """[rows] float64."""
    denominator: Tensor
    """[rows] float64; all ones for a plain mean."""

    @classmethod
    def mean(cls, values: Tensor | Sequence[float]) -> Figure:
        """The mean of one value a row: [rows]."""
        numerator = torch.as_tensor(values, dtype=torch.float64)
        return cls(numerator, torch.ones_like(numerator))

    @property
    def value(self) -> float:
        """The figure over all rows; NaN when its denominator is 0."""
        return (self.numerator.sum() / self.denominator.sum()).item()

    def select(self, rows: Tensor) -> Figure:
        """The same figure over some rows (index or mask)."""
        return Figure(self.numerator[rows], self.denominator[rows])


class Reconstructed:
    """Reconstructions of the rows compared; what several metrics need of them is computed once."""

    def __init__(
        self, reconstructions: Float[Tensor, "rows d_model"], comparisons: Comparisons
    ) -> None:
        self.reconstructions, self.comparisons = reconstructions, comparisons

    @cached_property
    def correct(self) -> Float[Tensor, " rows"]:
        """cos(r, v)."""
        return vectors.cosine(self.reconstructions, self.comparisons.originals)

    @cached_property
    def garbage(self) -> Float[Tensor, " rows"]:
        """cos(r, v')."""
        wrong = self.comparisons.pool[self.comparisons.wrong]
        return vectors.cosine(self.reconstructions, wrong)

    @cached_property
    def centred(self) -> Float[Tensor, " rows"]:
        """cos(c(r), c(v))."""
        comparisons = self.comparisons
        return vectors.centred_cosine(self.reconstructions, comparisons.originals, comparisons.mean)

    @cached_property
    def rank(self) -> Int[Tensor, " rows"]:
        """Of v in the 10-way choice."""
        return self.rank_among(self.comparisons.others[:, :NUM_OTHERS])

    def rank_among(self, others: Int[Tensor, "rows k"]) -> Int[Tensor, " rows"]:
        """Of v among itself and other rows of the pool, by centred cosine; 1 is best."""
        return ranks(self.reconstructions, self.comparisons, others)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of METRICS."""

    definition: str
    """One line."""
    figure: Callable[[Reconstructed], Figure | None]
    """None: too few rows to have it."""
    chance: Callable[[Comparisons], float | None] = lambda comparisons: None
    """What a description that says nothing scores; None: it is no choice, or it has no chance."""


def _top1_100way(read: Reconstructed) -> Figure | None:
    others = read.comparisons.others
    if others.shape[1] < MOST_OTHERS:
        return None
    return Figure.mean(read.rank_among(others[:, :MOST_OTHERS]) == 1)


def _top1_document(read: Reconstructed) -> Figure | None:
    others = read.comparisons.document_others
    has_others = (others >= 0).any(1).double()
    if not has_others.any():
        return None
    return Figure((read.rank_among(others) == 1) * has_others, has_others)


def _document_chance(comparisons: Comparisons) -> float | None:
    counts = (comparisons.document_others >= 0).sum(1)
    return (1 / (1 + counts[counts > 0])).mean().item() if counts.any() else None


def _raw_error(read: Reconstructed) -> Figure:
    """Scorers are trained on directions: each reconstruction gets the rows' mean length."""
    originals = read.comparisons.originals.double()
    length = norm(originals).mean().item()
    rescaled = vectors.rescale(read.reconstructions, length).double()
    error = (rescaled - originals).square().sum(-1)
    return Figure(error, (originals - originals.mean(0)).square().sum(-1))


def _magnitude(read: Reconstructed) -> Figure:
    scores = [
        _standard_scores(norm(x)[:, 0]) for x in (read.reconstructions, read.comparisons.originals)
    ]
    return Figure.mean(scores[0] * scores[1])


def _standard_scores(values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Values with mean 0 and variance 1; zeros where all values are equal."""
    deviation = values.double() - values.double().mean()
    spread = deviation.square().mean().sqrt()
    is_constant = spread <= _ROUNDING * values.double().abs().mean()
    return torch.zeros_like(deviation) if is_constant else deviation / spread


def _variance_explained(read: Reconstructed) -> Figure:
    originals = read.comparisons.originals
    error = vectors.squared_error(read.reconstructions, originals).double()
    spread = vectors.centre(originals, vectors.mean_direction(originals)).square().sum(-1).double()
    return Figure(spread - error, spread)


METRICS = {
    "correct_cosine": Metric(
        definition="mean cos(r, v), raw", figure=lambda read: Figure.mean(read.correct)
    ),
    "garbage_cosine": Metric(
        definition="mean cos(r, v'), raw; v' a fixed random row of another document",
        figure=lambda read: Figure.mean(read.garbage),
    ),
    "delta": Metric(
        definition="correct - garbage",
        figure=lambda read: Figure.mean(read.correct.double() - read.garbage.double()),
    ),
    "top1": Metric(
        definition="share of cos(r, v) > cos(r, v'); a 2-way choice",
        figure=lambda read: Figure.mean(read.correct > read.garbage),
        chance=lambda comparisons: 1 / 2,
    ),
    "top1_2way": Metric(
        definition="the same choice by centred cosine: raw, a v' near the mean fits everything",
        figure=lambda read: Figure.mean(read.rank_among(read.comparisons.wrong[:, None]) == 1),
        chance=lambda comparisons: 1 / 2,
    ),
    "centred_cosine": Metric(
        definition="mean cos(c(r), c(v))", figure=lambda read: Figure.mean(read.centred)
    ),
    "top1_10way": Metric(
        definition="share of v ranked first among 9 others by centred cosine",
        figure=lambda read: Figure.mean(read.rank == 1),
        chance=lambda comparisons: 1 / (1 + NUM_OTHERS),
    ),
    "mrr_10way": Metric(
        definition="mean of 1 / rank in that choice",
        figure=lambda read: Figure.mean(1.0 / read.rank.double()),
        chance=lambda comparisons: (
            sum(1 / rank for rank in range(1, 2 + NUM_OTHERS)) / (1 + NUM_OTHERS)
        ),
    ),
    "top1_10way_hard": Metric(
        definition="the same share among the 9 nearest rows of the domain, in other documents",
        figure=lambda read: Figure.mean(read.rank_among(read.comparisons.hard_others) == 1),
        chance=lambda comparisons: 1 / (1 + NUM_OTHERS),
    ),
    "top1_100way": Metric(
        definition="the same share among 99 others; the 9 of the 10-way choice are among them",
        figure=_top1_100way,
        chance=lambda comparisons: 1 / (1 + MOST_OTHERS),
    ),
    "top1_document": Metric(
        definition="the same share among the document's other rows, over rows that have some",
        figure=_top1_document,
        chance=_document_chance,
    ),
    "fve": Metric(
        definition="1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2", figure=_variance_explained
    ),
    "directional_error": Metric(
        definition="mean 1 - cos(r, v)",
        figure=lambda read: Figure.mean(1.0 - read.correct.double()),
    ),
    "raw_error": Metric(
        definition="sum |r - v|^2 / sum |v - mean v|^2, r rescaled to mean |v|", figure=_raw_error
    ),
    "magnitude": Metric(
        definition="correlation of |r| with |v|; 0 where all |r| are equal", figure=_magnitude
    ),
}
"""Name -> metric, in the order they are reported in. A tie counts against the right row."""


def figures(reconstructions: Tensor, comparisons: Comparisons) -> dict[str, Figure]:
    """The metrics of METRICS for reconstructions [rows, d_model] of the rows compared.

    The 100-way choice is left out where there are too few rows, and the choice inside documents
    where every document has one row. Raises ValueError for another number of rows and RuntimeError
    for values that are not finite.
    """
    if reconstructions.shape != comparisons.originals.shape:
        raise ValueError(
            f"reconstructions: got shape {tuple(reconstructions.shape)}, expected"
            f" {tuple(comparisons.originals.shape)}, one for each original. Reconstruct every"
            " description, empty ones too."
        )
    if not torch.isfinite(reconstructions).all():
        raise RuntimeError(
            "reconstructions: got values that are not finite, expected finite ones. "
            "Train the reconstructor again."
        )
    read = Reconstructed(reconstructions, comparisons)
    computed = {name: metric.figure(read) for name, metric in METRICS.items()}
    return {name: figure for name, figure in computed.items() if figure is not None}


def chances(comparisons: Comparisons) -> dict[str, float]:
    """What a description that says nothing scores, for the metrics that are choices."""
    by_metric = {name: metric.chance(comparisons) for name, metric in METRICS.items()}
    return {name: chance for name, chance in by_metric.items() if chance is not None}


def retrieval(
    reconstructions: Float[Tensor, "rows d_model"], comparisons: Comparisons
) -> dict[int, Figure]:
    """k -> top-1 among k activations by centred cosine.

    The sizes are those of RETRIEVAL_SIZES that there are rows for.
    """
    better = beaten_by(reconstructions, comparisons, comparisons.others)
    return {
        size: Figure.mean(~better[:, : size - 1].any(1))
        for size in RETRIEVAL_SIZES
        if size - 1 <= better.shape[1]
    }
