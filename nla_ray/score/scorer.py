"""A scorer: a reconstructor plus the comparison with the original.

It knows neither Ray nor rewards. Protects the rule: ONE reconstruction per description, which is
then compared with the right activation and with every wrong one, so that the scores of a
description differ by the activations alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.score.reconstructor import DescriptionReader

ScorerName = Literal["reward_scorer", "judge_scorer"]
"""Artifacts of the scorers that are reconstructors."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Cosines of a batch of descriptions, each with one right and k wrong activations.

    Example: right=[0.99, 0.97], wrong=[[0.97], [0.98]]: the second description fits its wrong
    activation better.
    """

    right: Float[Tensor, " batch"]
    """cos(r, right)."""
    wrong: Float[Tensor, "batch k"]
    """cos(r, wrong)."""
    centred_right: Float[Tensor, " batch"]
    """cos(c(r), c(right)): without the train mean direction."""
    centred_wrong: Float[Tensor, "batch k"]
    """cos(c(r), c(wrong))."""
    reconstruction: Float[Tensor, "batch d_model"]
    """r."""


def compare(
    reconstruction: Float[Tensor, "batch d_model"],
    right: Tensor,
    wrong: Tensor,
    mean: Float[Tensor, " d_model"],
) -> Scores:
    """Scores of reconstructions, centred by the train mean direction.

    `right` [batch, d_model] and `wrong` [batch, k, d_model] come from callers' data: other shapes
    raise ValueError.
    """
    n, d_model = reconstruction.shape
    if (
        right.shape != (n, d_model)
        or wrong.ndim != 3
        or wrong.shape[0] != n
        or wrong.shape[2] != d_model
    ):
        raise ValueError(
            f"scores: got right {tuple(right.shape)} and wrong {tuple(wrong.shape)} for {n}"
            f" descriptions, expected ({n}, {d_model}) and ({n}, k, {d_model}). Pass one right row"
            " and k wrong rows per description."
        )
    repeated = reconstruction.unsqueeze(1)
    return Scores(
        right=vectors.cosine(reconstruction, right),
        wrong=vectors.cosine(repeated, wrong),
        centred_right=vectors.centred_cosine(reconstruction, right, mean),
        centred_wrong=vectors.centred_cosine(repeated, wrong, mean),
        reconstruction=reconstruction,
    )


class Scorer:
    """Scores descriptions with one reconstructor. Several scorers may share one loaded base."""

    def __init__(self, reconstructor: DescriptionReader, batch_size: int = 64) -> None:
        self.reconstructor, self.batch_size = reconstructor, batch_size

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The train mean direction, on CPU."""
        return self.reconstructor.mean.cpu()

    def score(self, descriptions: Sequence[str], right: Tensor, wrong: Tensor) -> Scores:
        """Scores against right activations [batch, d_model] and wrong ones [batch, k, d_model].

        k may be 0. Raises ValueError for other shapes.
        """
        reconstruction = self.reconstructor.reconstruct(descriptions, self.batch_size)
        return compare(reconstruction, torch.as_tensor(right), torch.as_tensor(wrong), self.mean)
