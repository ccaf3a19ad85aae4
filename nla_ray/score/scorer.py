"""A scorer: a reconstructor plus the comparison with the original. Plain class, no Ray, no reward.

Protects the rule: ONE reconstruction per description, which is then compared with the right
activation and with every wrong one, so that the scores of one description differ by the activations
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.score.reconstructor import Reconstructor

ScorerName = Literal["reward_scorer", "judge_scorer"]
"""Artifacts of the scorers that are reconstructors."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Cosines of n descriptions with one right and k wrong activations each.

    Example: right=[0.99, 0.97] wrong=[[0.97], [0.98]] - the second description fits the wrong
    activation better.
    """

    right: Tensor
    """cos(r, right): [n]."""
    wrong: Tensor
    """cos(r, wrong): [n, k]."""
    centred_right: Tensor
    """cos(c(r), c(right)), the train mean direction taken out: [n]."""
    centred_wrong: Tensor
    """[n, k]."""
    reconstruction: Tensor
    """r: [n, d_model]."""


def compare(reconstruction: Tensor, right: Tensor, wrong: Tensor, mean: Tensor) -> Scores:
    """Scores of reconstructions [n, d] against right [n, d] and wrong [n, k, d], centred by `mean`
    [d]."""
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

    def __init__(self, reconstructor: Reconstructor, batch_size: int = 64) -> None:
        self.reconstructor, self.batch_size = reconstructor, batch_size

    @property
    def mean(self) -> Tensor:
        """The train mean direction [d_model], on CPU."""
        return self.reconstructor.mean.cpu()

    def score(self, descriptions: Sequence[str], right: Tensor, wrong: Tensor) -> Scores:
        """Scores of n descriptions against right activations [n, d_model] and wrong ones [n, k,
        d_model] (k may be 0)."""
        reconstruction = self.reconstructor.reconstruct(descriptions, self.batch_size)
        return compare(reconstruction, torch.as_tensor(right), torch.as_tensor(wrong), self.mean)
