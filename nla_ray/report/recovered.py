"""Patch-back as figures: how much of what the base says next comes back with a reconstruction.

Pure: it is given divergences, one a patched row, and makes figures over all rows of the report, so
that intervals and paired differences are those of every other figure. Source: the evaluation
definitions; the mean direction, at the activation's length, is what knows nothing of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_ray.activation.patching import Patched
from nla_ray.score.metrics import Figure


@dataclass(frozen=True, kw_only=True)
class PatchBack:
    """What the base said with each reconstruction in place of the activation.

    Example, one row of five: rows=[3], mean_divergence=<[2.0]>, by_verbalizer={"gold": {"judge":
    Patched(divergence=<[0.5]>, keeps_top=<[True]>)}, "shuffled": ...}: gold recovers .75.
    """

    rows: Sequence[int]
    """Which rows of the report were patched."""
    left_out: int = 0
    """Rows that were to be patched, and whose prompt is no longer what was captured."""
    mean_divergence: Tensor
    """KL(clean || mean direction) of each of them, in nats."""
    by_verbalizer: Mapping[str, Mapping[str, Patched]]
    """Verbalizer -> scorer -> of each of these rows."""

    def figures(self, verbalizer: str, scorer: str, num_rows: int) -> dict[str, Figure]:
        """The figures of PATCH_FIGURES over all rows; a row that was not patched counts nowhere."""
        patched = self.by_verbalizer[verbalizer][scorer]
        shuffled = self.by_verbalizer["shuffled"][scorer]
        read = _Patches(self.mean_divergence.double(), patched, shuffled)
        return {
            name: Figure(*(self._spread(part, num_rows) for part in figure(read)))
            for name, figure in PATCH_FIGURES.items()
        }

    def _spread(self, values: Tensor, num_rows: int) -> Tensor:
        spread = torch.zeros(num_rows, dtype=torch.float64)
        spread[torch.tensor(self.rows)] = values.double()
        return spread


@dataclass(frozen=True)
class _Patches:
    mean: Tensor
    patched: Patched
    shuffled: Patched


def _recovered(read: _Patches) -> tuple[Tensor, Tensor]:
    """1 - mean KL(clean || patched) / mean KL(clean || mean direction).

    A ratio of means, not a mean of ratios: where the next token does not depend on the activation
    a row's own ratio is 0 / 0.
    """
    return read.mean - read.patched.divergence, read.mean


def _recovered_excess(read: _Patches) -> tuple[Tensor, Tensor]:
    """That share less the shuffled label's."""
    return read.shuffled.divergence.double() - read.patched.divergence, read.mean


def _patched_divergence(read: _Patches) -> tuple[Tensor, Tensor]:
    """Mean KL(clean || patched) in nats."""
    return read.patched.divergence, torch.ones_like(read.mean)


def _keeps_top(read: _Patches) -> tuple[Tensor, Tensor]:
    """Share of rows whose likeliest next token stays."""
    return read.patched.keeps_top, torch.ones_like(read.mean)


PATCH_FIGURES: dict[str, Callable[[_Patches], tuple[Tensor, Tensor]]] = {
    "recovered": _recovered,
    "recovered_excess": _recovered_excess,
    "patched_divergence": _patched_divergence,
    "keeps_top": _keeps_top,
}
"""Name -> numerator and denominator of each patched row, in the order of the report."""
