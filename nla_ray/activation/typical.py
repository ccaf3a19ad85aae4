"""How like a vector is the activations that a verbalizer has learned from.

A verbalizer describes whatever it is given: a difference of two activations, the mean of a hundred,
a direction from a file. What it says of a vector unlike all that it was trained on is worth little,
and nothing in the description shows it. Here a vector's place among train activations is measured:
its length, its distance from their mean direction, and its nearest ones. Pure: it knows no run.

Measured on SmolLM2-135M, layer 24, against 1,010 train activations: unlike them are .7% of 276 test
activations, a quarter of means of two, and all differences, means of ten, random and opposite ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_ray.activation.vectors import centre, direction, norm

_TAIL = 0.001
"""Share of train activations at each end beyond which a vector is unlike them."""
_NEAREST = 3
_DIGITS = 4
"""The last bits depend on what else is asked for, and with them which of two equals comes first."""


@dataclass(frozen=True, kw_only=True)
class Typicality:
    """A vector's place among train activations.

    Example, a difference of two activations: Typicality(norm_quantile=0.0, distance_quantile=1.0,
    nearest=(("a#0@4:31", 0.21),), nearest_quantile=0.0, is_unlike=True)
    """

    norm_quantile: float
    """Share of train activations that are shorter. A verbalizer does not see it: an activation is
    injected at one norm."""
    distance_quantile: float
    """Share of train activations whose direction lies nearer to the mean direction."""
    nearest: tuple[tuple[str, float], ...]
    """The nearest train activations and their centred cosines, to four digits, nearest first."""
    nearest_quantile: float
    """Share of train activations whose own nearest one lies farther from them than this one's."""
    is_unlike: bool
    """Whether its direction is farther from the mean, nearer to it, or more alone, than all but a
    thousandth of train activations; never of fewer than a thousand."""


class TrainActivations:
    """A sample of train activations, to place vectors among."""

    def __init__(self, ids: Sequence[str], rows: Tensor, mean: Tensor) -> None:
        """`rows` [n, d_model], at least 2, by their `ids`; `mean`: train mean direction [d_model].

        Takes n^2 d_model products, once.
        """
        if len(rows) < 2 or len(ids) != len(rows):
            raise ValueError(
                f"train activations: got {len(rows)} rows and {len(ids)} ids, expected at least 2"
                " of each. Capture more texts."
            )
        self._ids, self._mean = list(ids), mean.float()
        centred = centre(rows, self._mean)
        self._directions = direction(centred)
        self._norms = _length(rows).sort().values
        self._distances = _length(centred).sort().values
        likeness = self._directions @ self._directions.T
        likeness.fill_diagonal_(-1.0)
        self._own_nearest = likeness.amax(1).round(decimals=_DIGITS).sort().values

    def place(self, rows: Tensor) -> list[Typicality]:
        """Of each row of [n, d_model]."""
        centred = centre(rows, self._mean)
        distances = _share_below(self._distances, _length(centred))
        likeness = (direction(centred) @ self._directions.T).round(decimals=_DIGITS)
        nearest = likeness.sort(dim=1, descending=True, stable=True)
        alone = _share_below(self._own_nearest, nearest.values[:, 0])
        norms = _share_below(self._norms, _length(rows))
        unlike = (distances > 1 - _TAIL) | (distances < _TAIL) | (alone < _TAIL)
        unlike &= len(self._ids) >= 1 / _TAIL  # fewer cannot tell
        return [
            Typicality(
                norm_quantile=norms[row].item(),
                distance_quantile=distances[row].item(),
                nearest=tuple(
                    (self._ids[index], cosine)
                    for index, cosine in zip(
                        nearest.indices[row, :_NEAREST].tolist(),
                        nearest.values[row, :_NEAREST].tolist(),
                        strict=True,
                    )
                ),
                nearest_quantile=alone[row].item(),
                is_unlike=bool(unlike[row]),
            )
            for row in range(len(rows))
        ]


def _length(rows: Tensor) -> Tensor:
    """The logarithm of |x| of each row, to some digits: [n]."""
    return norm(rows).squeeze(-1).log().round(decimals=_DIGITS)


def _share_below(sorted_values: Tensor, values: Tensor) -> Tensor:
    """For each of `values` [n] the share of the sorted ones that are smaller."""
    return torch.searchsorted(sorted_values, values.contiguous()) / len(sorted_values)
