"""Arithmetic on activations, against numbers computed by hand."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from nla_ray.activation import vectors


def test_rescale_sets_the_norm_and_does_not_multiply_by_it() -> None:
    rescaled = vectors.rescale(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 150.0)
    torch.testing.assert_close(rescaled, torch.tensor([[90.0, 120.0], [90.0, 120.0]]))


def test_rescale_computes_in_float32_whatever_comes_in() -> None:
    values = torch.tensor(
        [300.0, 400.0], dtype=torch.float16
    )  # the squared norm, 250000, overflows float16
    assert vectors.rescale(values, 10.0).dtype == torch.float32
    torch.testing.assert_close(vectors.rescale(values, 10.0), torch.tensor([6.0, 8.0]))


def test_the_zero_vector_stays_zero_and_has_a_finite_gradient() -> None:
    zero = torch.zeros(3, requires_grad=True)
    rescaled = vectors.rescale(zero, 150.0)
    rescaled.sum().backward()
    assert rescaled.tolist() == [0, 0, 0]
    assert zero.grad.isfinite().all()


def test_direction_divides_by_the_norm() -> None:
    torch.testing.assert_close(
        vectors.direction(torch.tensor([[6.0, 8.0]])), torch.tensor([[0.6, 0.8]])
    )


def test_mean_direction_is_the_mean_of_directions_and_is_not_normalised_again() -> None:
    mean = vectors.mean_direction(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(mean, torch.tensor([0.5, 0.5]))  # norm 0.707


def test_centre_takes_the_mean_from_the_direction() -> None:
    torch.testing.assert_close(
        vectors.centre(torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.5])), torch.tensor([0.1, 0.3])
    )


def test_cosine_of_three_four_and_four_three_is_24_over_25() -> None:
    assert vectors.cosine(
        torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    ).item() == pytest.approx(0.96)


def test_cosine_broadcasts_one_vector_over_many() -> None:
    cosines = vectors.cosine(
        torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-4.0, 0.0]]])
    )
    torch.testing.assert_close(cosines, torch.tensor([[1.0, 0.0, -1.0]]))


def test_centred_cosine_sees_what_the_common_direction_hides() -> None:
    mean = torch.tensor([0.9, 0.0])
    first, second = (
        torch.tensor([0.96, 0.28]),
        torch.tensor([0.96, -0.28]),
    )  # unit vectors, cosine 0.8432
    assert vectors.cosine(first, second).item() == pytest.approx(0.96**2 - 0.28**2)
    expected = (0.06**2 - 0.28**2) / (0.06**2 + 0.28**2)  # (0.06, 0.28) and (0.06, -0.28): -0.9122
    assert vectors.centred_cosine(first, second, mean).item() == pytest.approx(expected, abs=1e-5)


def test_mean_pairwise_cosine_is_that_of_a_loop_over_pairs_and_a_zero_row_agrees_with_nothing() -> (
    None
):
    rows = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # pairs: 0, 1 / sqrt 2, 1 / sqrt 2
    assert vectors.mean_pairwise_cosine(rows).item() == pytest.approx(math.sqrt(2) / 3)
    assert vectors.mean_pairwise_cosine(
        torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 0.0]])
    ).item() == pytest.approx(1 / 3)
    many = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    slow = torch.stack(
        [
            torch.stack(
                [vectors.cosine(group[i], group[j]) for i in range(6) for j in range(i)]
            ).mean()
            for group in many
        ]
    )
    torch.testing.assert_close(vectors.mean_pairwise_cosine(many), slow)


def test_a_difference_is_of_directions_and_beside_the_mean_lies_its_way() -> None:
    difference = vectors.direction_difference(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 7.0]))
    torch.testing.assert_close(difference, torch.tensor([1.0, -1.0]))
    # |(0.6, 0) + t (0, 1)| = 1 at t = 0.8
    placed = vectors.beside_mean(torch.tensor([0.0, 5.0]), torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(placed, torch.tensor([0.6, 0.8]))
    generator = torch.Generator().manual_seed(0)
    mean = vectors.mean_direction(torch.randn(50, 8, generator=generator) + 2.0)
    differences = torch.randn(20, 8, generator=generator)
    placed = vectors.beside_mean(differences, mean)
    torch.testing.assert_close(vectors.norm(placed)[:, 0], torch.ones(20))
    cosines = vectors.cosine(vectors.centre(placed, mean), differences)
    torch.testing.assert_close(cosines, torch.ones(20))


def test_squared_error_is_twice_one_minus_cosine_and_at_most_four() -> None:
    assert vectors.squared_error(
        torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    ).item() == pytest.approx(0.08)
    assert vectors.squared_error(
        torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])
    ).item() == pytest.approx(4.0)


def test_variance_explained_of_a_hand_computed_case() -> None:
    original = torch.tensor(
        [[2.0, 0.0], [0.0, 3.0]]
    )  # mean direction (0.5, 0.5): spread 4 * 0.25 = 1
    reconstruction = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # errors 0 and 2 (1 - 1 / sqrt 2)
    expected = 1 - 2 * (1 - 1 / math.sqrt(2))
    assert vectors.variance_explained(reconstruction, original).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_variance_explained_is_one_for_the_originals_and_ignores_their_length() -> None:
    original = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert vectors.variance_explained(original * 7, original).item() == pytest.approx(1.0)


def test_shapes_are_checked_under_the_tests() -> None:
    with pytest.raises(TypeCheckError, match=r"mean.*d_model"):
        vectors.centre(torch.ones(2, 3), torch.ones(4))
