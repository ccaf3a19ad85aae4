"""Linear maps with fused epilogues: the arithmetic the generation engine spends its time in.

On a CPU the weight is packed once for oneDNN and silu, product and residual sum happen inside the
matrix product (at 64 rows about twice as fast on two cores as torch's default product, which splits
so few rows badly). Elsewhere the same formulas run as plain torch operations. Knows nothing of
models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Projection:
    """y = W x + b for rows x: [rows, in] -> [rows, out], with what follows it in a decoder
    block."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
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


class PackedProjection(Projection):
    """The same on CPU through oneDNN, by the operations that torch.compile emits there (they have
    no public wrapper)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, rows: int = 64) -> None:
        self._weight, self._bias = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows),
            bias,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "swish", [], "")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._weight, self._bias, "mul")

    def plus(self, x: Tensor, summand: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(
            x, summand, self._weight, self._bias, "add"
        )


def packing_works(weight: Tensor) -> bool:
    """Whether oneDNN can hold this weight packed: a CPU tensor of a type this processor multiplies
    natively."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def make_projection(weight: Tensor, bias: Tensor | None = None, *, rows: int = 64) -> Projection:
    """The fastest projection for a weight [out, in]; `rows` is the usual number of rows."""
    return (
        PackedProjection(weight, bias, rows=rows)
        if packing_works(weight)
        else Projection(weight, bias)
    )
