"""Logistic regression in a few passes: what turns scores into probabilities.

Newton's method in float64; the damping keeps weights finite where rows can be told apart without
error. Pure arithmetic. Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS = 25
_DAMPING = 1e-3


def fit_logistic(x: Float[Tensor, "rows inputs"], y: Float[Tensor, " rows"]) -> Tensor:
    """Weights [inputs] float64 of sigmoid(x @ weights), the probability that y is 1.

    A constant among the inputs is the caller's.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    >>> weights = fit_logistic(x, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    >>> torch.sigmoid(x.double() @ weights)[0].round(decimals=2)
    tensor(0.5000, dtype=torch.float64)
    """
    x, y = x.double(), y.double()
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    damping = _DAMPING * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(_STEPS):
        probability = torch.sigmoid(x @ weights)
        gradient = x.T @ (y - probability) - damping @ weights
        curvature = (x * (probability * (1 - probability))[:, None]).T @ x + damping
        weights = weights + torch.linalg.solve(curvature, gradient)
    return weights


def fit_constant(
    x: Float[Tensor, "rows inputs"], y: Float[Tensor, " rows"], weights: Tensor
) -> Tensor:
    """The weights [inputs] with another first one, so that the mean of y is expected.

    The first input is 1 in every row.
    """
    x, y, weights = x.double(), y.double(), weights.clone()
    for _ in range(_STEPS):
        probability = torch.sigmoid(x @ weights)
        spread = (probability * (1 - probability)).sum() + _DAMPING
        weights[0] += (y - probability).sum() / spread
    return weights
