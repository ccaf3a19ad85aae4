"""All arithmetic on activations: rescale, direction, centre, cosine, variance explained.

Everything is computed in float32, whatever comes in. It knows neither models nor files. Notation
(Source: the evaluation definitions): v original, r reconstruction, n(x) = x / |x|, mu = mean of
n(v) over the train split (not re-normalised), c(x) = n(x) - mu.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-12
"""Added to the squared norm INSIDE the root: the zero vector has a gradient and stays zero."""


def norm(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
    """|x| over the last dimension, which is kept as size 1; epsilon is inside the root."""
    return (x.float().square().sum(-1, keepdim=True) + EPSILON).sqrt()


def rescale(
    x: Float[Tensor, "*batch d_model"], target_norm: float | Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch d_model"]:
    """x with its L2 norm made EQUAL to `target_norm` (not multiplied by it), float32."""
    return x.float() * (target_norm / norm(x))


def direction(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """n(x) = x / |x|, float32."""
    return x.float() / norm(x)


def mean_direction(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, " d_model"]:
    """mu = mean over rows of n(x), not re-normalised."""
    return direction(x).mean(0)


def centre(
    x: Float[Tensor, "*batch d_model"], mean: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """c(x) = n(x) - mu."""
    return direction(x) - mean.float()


def direction_difference(
    first: Float[Tensor, "*batch d_model"], second: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """n(first) - n(second): what a verbalizer is given of two activations, of any length."""
    return direction(first) - direction(second)


def beside_mean(
    difference: Float[Tensor, "*batch d_model"], mean: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """The unit vector u = mu + t n(difference), t > 0: an activation whose c(u) is t n(difference).

    So whatever compares activations without their mean compares differences, which have none.
    """
    towards, mean = direction(difference), mean.float()
    along = (towards * mean).sum(-1, keepdim=True)
    length = (along.square() + 1.0 - mean.square().sum()).clamp(min=0.0).sqrt() - along
    return mean + length * towards


def cosine(
    a: Float[Tensor, "*#batch d_model"], b: Float[Tensor, "*#batch d_model"]
) -> Float[Tensor, "*batch"]:
    """Cosine over the last dimension; the dimensions before it are broadcast."""
    return (direction(a) * direction(b)).sum(-1)


def centred_cosine(
    reconstruction: Float[Tensor, "*#batch d_model"],
    original: Float[Tensor, "*#batch d_model"],
    mean: Float[Tensor, " d_model"],
) -> Float[Tensor, "*batch"]:
    """cos(c(r), c(v)): the cosine without the layer's mean direction."""
    return cosine(centre(reconstruction, mean), centre(original, mean))


def mean_pairwise_cosine(x: Float[Tensor, "*batch samples d_model"]) -> Float[Tensor, "*batch"]:
    """Mean of cos(x_i, x_j) over the pairs i < j of N >= 2 samples, between -1 and 1.

    (|sum_i n(x_i)|^2 - sum_i |n(x_i)|^2) / (N (N - 1)): linear in N, and a zero sample has cosine 0
    with every other.
    """
    directions, samples = direction(x), x.shape[-2]
    pairs = directions.sum(-2).square().sum(-1) - directions.square().sum((-2, -1))
    # Rounding leaves the interval by 1e-7.
    return (pairs / (samples * (samples - 1))).clamp(-1.0, 1.0)


def squared_error(
    reconstruction: Float[Tensor, "*#batch d_model"], original: Float[Tensor, "*#batch d_model"]
) -> Float[Tensor, "*batch"]:
    """|n(r) - n(v)|^2 = 2 (1 - cos(r, v)), between 0 and 4."""
    return (direction(reconstruction) - direction(original)).square().sum(-1)


def mean_squared_error(
    reconstruction: Float[Tensor, "*#batch d_model"],
    original: Float[Tensor, "*#batch d_model"],
    target_norm: float | None,
) -> Float[Tensor, "*batch"]:
    """Mean over d_model of (r - v)^2, both with the norm `target_norm`; None: as they are.

    With the norm sqrt(d_model) it is `squared_error`. Source: the reference implementation, which
    trains reconstructors by it.
    """
    if target_norm is not None:
        reconstruction, original = (rescale(x, target_norm) for x in (reconstruction, original))
    return (reconstruction.float() - original.float()).square().mean(-1)


def variance_explained(
    reconstruction: Float[Tensor, "rows d_model"], original: Float[Tensor, "rows d_model"]
) -> Float[Tensor, ""]:
    """FVE = 1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2.

    The mean is over the rows given and not re-normalised.
    """
    spread = centre(original, mean_direction(original)).square().sum()
    return 1.0 - squared_error(reconstruction, original).sum() / spread
