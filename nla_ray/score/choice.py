"""Choosing among samples: the best of N by a scorer, and how far the N agree.

Pure arithmetic on reconstructions; it knows neither Ray nor files, neither text nor models. The
rule it protects: what chooses is the REWARD scorer's reconstruction. The judge scorer is never
asked, so it stays fit to say what the choice was worth.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from nla_ray.activation import vectors


def best_of(
    reconstructions: Tensor, activations: Tensor, mean: Float[Tensor, " d_model"]
) -> Int[Tensor, " batch"]:
    """argmax_s cos(c(r_is), c(v_i)): the sample that fits its activation best, the first of equals.

    `reconstructions` [batch, N, d_model] by the reward scorer, of N samples of each of
    `activations` [batch, d_model]; `mean`: the train mean direction. Raises ValueError for other
    shapes.

    Here the cosines are 0, 0.71 and 0.71:

    >>> import torch
    >>> samples = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    >>> best_of(samples, torch.tensor([[1.0, 0.0]]), mean=torch.zeros(2))
    tensor([1])
    """
    batch, _, d_model = _checked(reconstructions, 1)
    if activations.shape != (batch, d_model):
        raise ValueError(
            f"best of N: got activations of shape {tuple(activations.shape)}, expected ({batch},"
            f" {d_model}). Pass the one activation that each group of samples describes."
        )
    return vectors.centred_cosine(reconstructions, activations.unsqueeze(1), mean).argmax(1)


def agreement(reconstructions: Tensor, mean: Float[Tensor, " d_model"]) -> Float[Tensor, " batch"]:
    """Mean of cos(c(r_is), c(r_it)) over the pairs s < t of N >= 2 samples.

    Arguments as in `best_of`. 1: all mean the same; about 0: nothing in common; never below
    -1 / (N - 1). The activation is not asked: samples may agree on what is wrong.

    Here the pairs have cosines 1, 0 and 0:

    >>> import torch
    >>> samples = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> agreement(samples, mean=torch.zeros(2))
    tensor([0.3333])
    """
    _checked(reconstructions, 2)
    return vectors.mean_pairwise_cosine(vectors.centre(reconstructions, mean))


def _checked(reconstructions: Tensor, fewest: int) -> tuple[int, int, int]:
    """The shape [batch, N, d_model]; ValueError for others and for N below `fewest`."""
    if reconstructions.ndim != 3 or reconstructions.shape[1] < fewest:
        raise ValueError(
            f"samples: got reconstructions of shape {tuple(reconstructions.shape)}, expected"
            f" [n, N, d_model] with N at least {fewest}. Draw more samples of each activation, in"
            " groups of one size."
        )
    batch, samples, d_model = reconstructions.shape
    return batch, samples, d_model
