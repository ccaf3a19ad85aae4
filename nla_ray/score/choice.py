"""Choosing among samples: the best of N by a scorer, and how far the N agree.

Pure arithmetic on reconstructions; it knows neither Ray nor files, neither text nor models. n
activations, N samples of each, d = d_model. The rule it protects: what chooses is the REWARD
scorer's reconstruction, so that the judge scorer, which is never asked, stays fit to say what the
choice was worth.
"""

from __future__ import annotations

from torch import Tensor

from nla_ray.activation import vectors


def best_of(reconstructions: Tensor, activations: Tensor, mean: Tensor) -> Tensor:
    """argmax_s cos(c(r_is), c(v_i)): the sample that fits its activation best, the first of equals:
    [n] int64.

    `reconstructions` [n, N, d], by the reward scorer; `activations` [n, d]; `mean`: the train mean
    direction [d].

    Example: mean [0, 0], activation [1, 0], samples [0, 1], [1, 1], [1, 1]: cosines 0, 0.71, 0.71
    -> 1.
    """
    n, _, d_model = _checked(reconstructions, 1)
    if activations.shape != (n, d_model):
        raise ValueError(
            f"best of N: got activations of shape {tuple(activations.shape)}, expected ({n},"
            f" {d_model}). Pass the one activation that each group of samples describes."
        )
    return vectors.centred_cosine(reconstructions, activations.unsqueeze(1), mean).argmax(1)


def agreement(reconstructions: Tensor, mean: Tensor) -> Tensor:
    """Mean of cos(c(r_is), c(r_it)) over the pairs s < t of N >= 2 samples: [n], 1 where all mean
    the same.

    Arguments as in `best_of`. The activation is not asked: samples may agree on what is wrong. Of N
    samples that have nothing in common it is about 0; it is never below -1 / (N - 1).

    Example: mean [0, 0], samples [1, 0], [1, 0], [0, 1]: pairs 1, 0, 0 -> 1/3.
    """
    _checked(reconstructions, 2)
    return vectors.mean_pairwise_cosine(vectors.centre(reconstructions, mean))


def _checked(reconstructions: Tensor, fewest: int) -> tuple[int, int, int]:
    """The shape n, N, d. Raises ValueError for another form and for fewer than `fewest` samples."""
    shape = tuple(reconstructions.shape)
    if len(shape) != 3 or shape[1] < fewest:
        raise ValueError(
            f"samples: got reconstructions of shape {shape}, expected [n, N, d_model] with N at"
            f" least {fewest}. Draw more samples of each activation, in groups of one size."
        )
    return shape
