"""Intervals: 95% percentile bootstrap over families, of figures and of paired differences.

Rows of one document, and of documents that share text, are not independent. So families of
documents are drawn, not rows: a resample is a count per family, and a figure on it is the ratio of
two count-weighted sums. One set of resamples serves every figure, so that differences are paired.
Source: Efron & Tibshirani, An Introduction to the Bootstrap, ch. 13 (percentile interval).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_ray.score.metrics import Figure

_LEVELS = (0.025, 0.975)
_BLOCK_RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95% interval.

    Example: Interval(value=0.94, low=0.92, high=0.955, n=1088, families=412)
    """

    value: float
    low: float
    high: float
    n: int
    """Activations that the figure says something of: those with a denominator."""
    families: int
    """Families that these come from; a document that shares text with none is a family."""

    def to_dict(self) -> dict[str, float | int]:
        """As a report holds it."""
        return dataclasses.asdict(self)


class FamilyBootstrap:
    """Seeded resamples of the families that a set of rows comes from."""

    def __init__(self, family_ids: Sequence[str], resamples: int = 10_000, seed: int = 0) -> None:
        if not family_ids:
            raise ValueError("bootstrap: got no rows, expected at least one. Evaluate a document.")
        numbers = {family_id: number for number, family_id in enumerate(sorted(set(family_ids)))}
        self.rows, self.families, self.resamples = len(family_ids), len(numbers), resamples
        self._family = torch.tensor([numbers[family_id] for family_id in family_ids])
        self._counts = _draw_counts(self.families, resamples, seed)

    def intervals(self, figures: Mapping[str, Figure]) -> dict[str, Interval]:
        """Every figure (of these rows, in their order) with its interval.

        Raises ValueError for an undefined figure.
        """
        sampled = self._sample(list(figures.values()))
        return {
            name: self._interval(name, figure.value, values, figure.denominator != 0)
            for (name, figure), values in zip(figures.items(), sampled, strict=True)
        }

    def differences(
        self, first: Mapping[str, Figure], second: Mapping[str, Figure]
    ) -> dict[str, Interval]:
        """first - second for the names in `first`, on the same resamples: paired."""
        return self._paired(first, second, operator.sub)

    def ratios(
        self, first: Mapping[str, Figure], second: Mapping[str, Figure]
    ) -> dict[str, Interval]:
        """first / second for the names in `first`, on the same resamples: paired."""
        return self._paired(first, second, operator.truediv)

    def _paired(
        self,
        first: Mapping[str, Figure],
        second: Mapping[str, Figure],
        combine: Callable[[Any, Any], Any],
    ) -> dict[str, Interval]:
        names = list(first)
        sampled = self._sample([*first.values(), *(second[name] for name in names)])
        combined = combine(sampled[: len(names)], sampled[len(names) :])
        return {
            name: self._interval(
                name,
                combine(first[name].value, second[name].value),
                values,
                (first[name].denominator != 0) | (second[name].denominator != 0),
            )
            for name, values in zip(names, combined, strict=True)
        }

    def _sample(self, figures: Sequence[Figure]) -> Tensor:
        """Each figure on each resample: [figures, resamples]."""
        columns = torch.stack(
            [part for figure in figures for part in (figure.numerator, figure.denominator)], dim=1
        )
        if len(columns) != self.rows:
            raise ValueError(
                f"bootstrap: got figures over {len(columns)} rows, expected {self.rows}. "
                "Use the rows it was built for."
            )
        sums = torch.zeros(self.families, columns.shape[1], dtype=torch.float64)
        sums.index_add_(0, self._family, columns.double())
        sampled = torch.cat(
            [counts.double() @ sums for counts in self._counts.split(_BLOCK_RESAMPLES)]
        )
        return (sampled[:, 0::2] / sampled[:, 1::2]).T

    def _interval(self, name: str, value: float, sampled: Tensor, counted: Tensor) -> Interval:
        if value != value:
            raise ValueError(
                f"figure {name}: got a denominator of 0, expected rows that differ. "
                "Evaluate more documents."
            )
        # a resample on which the ratio is 0 / 0 says nothing and is left out
        low, high = torch.nanquantile(sampled, torch.tensor(_LEVELS, dtype=torch.float64)).tolist()
        return Interval(
            value=value,
            low=low,
            high=high,
            n=int(counted.sum()),
            families=len(self._family[counted].unique()),
        )


def _draw_counts(families: int, resamples: int, seed: int) -> Tensor:
    """How often each family is drawn in each resample: [resamples, families] int16.

    Rows sum to `families`.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, resamples, _BLOCK_RESAMPLES):
        size = min(_BLOCK_RESAMPLES, resamples - start)
        drawn = torch.randint(families, (size, families), generator=generator)
        once = torch.ones_like(drawn, dtype=torch.int16)
        blocks.append(torch.zeros(size, families, dtype=torch.int16).scatter_add_(1, drawn, once))
    return torch.cat(blocks)
