"""Linear maps with what follows them in a decoder block; decoding spends its time here.

Plain torch operations anywhere, and oneDNN's packed ones where they work. Knows nothing of models.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from nla_ray.cpu.projection import PackedProjection, packing_works


class PlainProjection:
    """y = W x + b for rows x: [rows, in] -> [rows, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` [out, in], `bias` [out]."""
        self._weight, self._bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        """W x + b."""
        return F.linear(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu(W x + b)."""
        return F.silu(self(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(W x + b) * factor, factor of shape [rows, out]."""
        return self(x).mul_(factor)

    def plus(self, x: Tensor, summand: Tensor) -> Tensor:
        """W x + b + summand, summand of shape [rows, out]."""
        return self(x).add_(summand)


Projection = PlainProjection | PackedProjection


def make_projection(weight: Tensor, bias: Tensor | None = None, *, rows: int = 64) -> Projection:
    """The fastest projection for a weight [out, in]; `rows` is the usual number of rows."""
    if packing_works(weight):
        return PackedProjection(weight, bias, rows=rows)
    return PlainProjection(weight, bias)
