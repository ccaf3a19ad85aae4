"""All arithmetic on activations: rescale, direction, centre, cosine, variance explained.

Everything is computed in float32, whatever comes in. Notation (Source: the evaluation definitions):
v original, r reconstruction, n(x) = x / |x|, mu = mean of n(v) over the train split (not
re-normalised), c(x) = n(x) - mu.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-12
"""Added to the squared norm INSIDE the root, so that the zero vector has a gradient and stays
zero."""


def norm(x: Tensor) -> Tensor:
    """|x| over the last dimension, kept as size 1, with epsilon inside the root: [..., d_model] ->
    [..., 1]."""
    return (x.float().square().sum(-1, keepdim=True) + EPSILON).sqrt()


def rescale(x: Tensor, target_norm: float) -> Tensor:
    """x with its L2 norm made EQUAL to `target_norm` (not multiplied by it): [..., d_model],
    float32."""
    return x.float() * (target_norm / norm(x))


def direction(x: Tensor) -> Tensor:
    """n(x) = x / |x|: [..., d_model], float32."""
    return x.float() / norm(x)


def mean_direction(x: Tensor) -> Tensor:
    """mu = mean over rows of n(x), not re-normalised: [rows, d_model] -> [d_model]."""
    return direction(x).mean(0)


def centre(x: Tensor, mean: Tensor) -> Tensor:
    """c(x) = n(x) - mu: [..., d_model]."""
    return direction(x) - mean.float()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension, broadcasting the rest: [..., d_model] x [..., d_model] ->
    [...]."""
    return (direction(a) * direction(b)).sum(-1)


def centred_cosine(reconstruction: Tensor, original: Tensor, mean: Tensor) -> Tensor:
    """cos(c(r), c(v)): what is left of the cosine when the layer's mean direction is taken out:
    [...]."""
    return cosine(centre(reconstruction, mean), centre(original, mean))


def mean_pairwise_cosine(x: Tensor) -> Tensor:
    """Mean of cos(x_i, x_j) over the pairs i < j of N >= 2 rows: [..., N, d_model] -> [...],
    between -1 and 1.

    (|sum_i n(x_i)|^2 - sum_i |n(x_i)|^2) / (N (N - 1)): linear in N, and a zero row has cosine 0
    with every other.
    """
    directions, rows = direction(x), x.shape[-2]
    pairs = directions.sum(-2).square().sum(-1) - directions.square().sum((-2, -1))
    return (pairs / (rows * (rows - 1))).clamp(-1.0, 1.0)  # rounding leaves the interval by 1e-7


def squared_error(reconstruction: Tensor, original: Tensor) -> Tensor:
    """|n(r) - n(v)|^2 = 2 (1 - cos(r, v)): [...]. Between 0 and 4."""
    return (direction(reconstruction) - direction(original)).square().sum(-1)


def variance_explained(reconstruction: Tensor, original: Tensor) -> Tensor:
    """FVE = 1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2, the mean over the rows given and
    not re-normalised."""
    spread = centre(original, mean_direction(original)).square().sum()
    return 1.0 - squared_error(reconstruction, original).sum() / spread
