"""Best of N and agreement, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nla_ray.score.choice import agreement, best_of

ORIGIN = torch.zeros(2)


def test_the_best_sample_is_the_one_nearest_to_the_activation() -> None:
    samples = torch.tensor(
        [[[0.0, 1.0], [1.0, 1.0], [1.0, 0.1]], [[0.0, 1.0], [1.0, 1.0], [1.0, 0.1]]]
    )
    best = best_of(samples, torch.tensor([[5.0, 0.0], [0.0, 0.2]]), ORIGIN)
    assert best.tolist() == [2, 0]
    assert best.dtype == torch.int64


def test_of_equally_good_samples_the_first_is_chosen() -> None:
    samples = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])  # cosines 0, 0.71, 0.71
    assert best_of(samples, torch.tensor([[1.0, 0.0]]), ORIGIN).tolist() == [1]
    assert best_of(samples[:, 1:], torch.tensor([[1.0, 0.0]]), ORIGIN).tolist() == [0]


def test_the_choice_is_made_with_the_mean_taken_out() -> None:
    # v = (0.8, 0.6), mu = (0.8, 0): c(v) = (0, 0.6). Raw cosines 0.8 and 0.6 favour the first
    # sample; c((1, 0)) = (0.2, 0) has centred cosine 0, c((0, 1)) = (-0.8, 1) has 1 / sqrt(1.64) =
    # 0.78.
    samples, activation = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[4.0, 3.0]])
    assert best_of(samples, activation, ORIGIN).tolist() == [0]
    assert best_of(samples, activation, torch.tensor([0.8, 0.0])).tolist() == [1]


def test_one_sample_is_the_best_of_one() -> None:
    assert best_of(torch.ones(3, 1, 2), torch.ones(3, 2), ORIGIN).tolist() == [0, 0, 0]


def test_agreement_is_the_mean_cosine_of_the_pairs() -> None:
    samples = torch.tensor(
        [
            [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]],  # pairs 1, 0, 0
            [[1.0, 0.0], [7.0, 0.0], [3.0, 0.0]],  # all mean the same
            [
                [1.0, 0.0],
                [-0.5, math.sqrt(0.75)],
                [-0.5, -math.sqrt(0.75)],
            ],  # three ways as far apart as can be
        ]
    )
    torch.testing.assert_close(agreement(samples, ORIGIN), torch.tensor([1 / 3, 1.0, -0.5]))


def test_agreement_has_the_mean_taken_out() -> None:
    # mu = (0.5, 0.5): c((1, 0)) = (0.5, -0.5) and c((0, 1)) = (-0.5, 0.5) are opposite, where raw
    # they are orthogonal
    samples = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(agreement(samples, ORIGIN), torch.tensor([0.0]))
    torch.testing.assert_close(agreement(samples, torch.tensor([0.5, 0.5])), torch.tensor([-1.0]))


def test_agreement_never_leaves_its_interval() -> None:
    one = torch.randn(64, 1, 33, generator=torch.Generator().manual_seed(0))
    same = agreement(one.expand(-1, 16, -1), torch.zeros(33))
    opposite = agreement(torch.cat([one, -one], 1), torch.zeros(33))
    assert same.max() <= 1 and same.min() > 0.99999
    assert opposite.min() >= -1 and opposite.max() < -0.99999


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="N at least 2"):
        agreement(torch.ones(3, 1, 2), ORIGIN)
    with pytest.raises(ValueError, match=r"\[n, N, d_model\]"):
        best_of(torch.ones(3, 2), torch.ones(3, 2), ORIGIN)
    with pytest.raises(ValueError, match=r"\(2, 2\), expected \(3, 2\)"):
        best_of(torch.ones(3, 4, 2), torch.ones(2, 2), ORIGIN)
