"""Linear maps with what follows them in a decoder block; decoding spends its time here.

Plain torch operations anywhere, and oneDNN's packed ones where they work; an adapter's two thin
factors beside a weight; an output head in float32. Knows nothing of models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nla_ray.cpu.projection import PackedProjection, packing_works, products_in_bf16


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


class AdaptedProjection:
    """y = W x + b + B A x for rows x: [rows, in] -> [rows, out], the factors beside the weight.

    An adapter that is added to a weight of bfloat16 is rounded to the weight's own steps: where it
    is small beside them, most of it is lost. Here it is computed as PEFT computes it in training.
    """

    def __init__(self, frozen: FrozenProjection, down: Tensor, up: Tensor) -> None:
        """`frozen`: W x + b. `down` A [rank, in], `up` B times the scaling [out, rank]."""
        self._frozen, self._down, self._up = frozen, down, up

    @property
    def factor_shapes(self) -> tuple[torch.Size, torch.Size]:
        """Of A and B."""
        return self._down.shape, self._up.shape

    def copy_factors(self, other: AdaptedProjection) -> None:
        """Take the other's factors, of the same shapes, into the tensors that hold these."""
        self._down.copy_(other._down)
        self._up.copy_(other._up)

    def __call__(self, x: Tensor) -> Tensor:
        """W x + b + B A x; W x + b is rounded before the sum, as it is in training."""
        return self._frozen(x).add_(F.linear(F.linear(x, self._down), self._up))

    def silu(self, x: Tensor) -> Tensor:
        """silu(W x + b + B A x)."""
        return F.silu(self(x), inplace=True)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(W x + b + B A x) * factor, factor of shape [rows, out]."""
        return self(x).mul_(factor)

    def plus(self, x: Tensor, summand: Tensor) -> Tensor:
        """W x + b + B A x + summand, summand of shape [rows, out]."""
        return self(x).add_(summand)


FrozenProjection = PlainProjection | PackedProjection
Projection = FrozenProjection | AdaptedProjection


class Float32Head:
    """Logits in float32 of a stream in a narrower type: [rows, d_model] -> [rows, vocab].

    A logit of 20 in bfloat16 is right to 0.06 only. The products of two bfloat16 numbers are exact
    in float32: a GPU adds them there, and oneDNN does where it is told that float32 inputs hold no
    more than bfloat16.
    """

    def __init__(self, weight: Tensor, *, rows: int = 64) -> None:
        """`weight` [vocab, d_model]."""
        self._on_gpu = weight.is_cuda
        self._weight = weight.t() if self._on_gpu else make_projection(weight.float(), rows=rows)

    def __call__(self, stream: Tensor) -> Tensor:
        """W x."""
        if self._on_gpu:
            return torch.mm(stream, self._weight, out_dtype=torch.float32)
        with products_in_bf16():
            return self._weight(stream.float())


def make_projection(
    weight: Tensor, bias: Tensor | None = None, *, rows: int = 64
) -> FrozenProjection:
    """The fastest projection for a weight [out, in]; `rows` is the usual number of rows."""
    if packing_works(weight):
        return PackedProjection(weight, bias, rows=rows)
    return PlainProjection(weight, bias)
