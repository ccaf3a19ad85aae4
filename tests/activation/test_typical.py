"""A vector's place among train activations, against values by hand and against what is not one."""

import pytest
import torch

from nla_ray.activation import vectors
from nla_ray.activation.stage import capture_activations, load_activations, load_train_activations
from nla_ray.activation.typical import TrainActivations

MEAN = torch.tensor([1.0, 0.0, 0.0, 0.0])


def cloud(count: int, seed: int = 0) -> torch.Tensor:
    """Activations as they are: one common direction, less of everything else, norms near 10."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(count, 64, generator=draw) * 0.02
    spread[:, 0] += 1.0
    return spread * (10 + torch.rand(count, 1, generator=draw))


def reference(rows: torch.Tensor) -> TrainActivations:
    ids = [str(number) for number in range(len(rows))]
    return TrainActivations(ids, rows, vectors.mean_direction(rows))


def test_quantiles_and_nearest_are_those_of_the_train_rows() -> None:
    rows = torch.tensor([[1.0, 0.1, 0, 0], [2.0, 0, 0.4, 0], [3.0, 0, 0, 0.9], [4.0, -1.6, 0, 0]])
    train = TrainActivations(["a", "b", "c", "d"], rows, MEAN)
    # Between b and c in length (2.57) and in distance from the mean; like b, and no other.
    [place] = train.place(torch.tensor([[2.5, 0.0, 0.6, 0.0]]))
    assert (place.norm_quantile, place.distance_quantile) == (0.5, 0.5)
    assert place.nearest[0][0] == "b" and place.nearest[0][1] > 0.99
    assert len(place.nearest) == 3 and place.nearest[0][1] >= place.nearest[1][1]
    assert place.nearest_quantile == 1.0  # no train row is that near to another one


def test_an_activation_like_those_of_training_is_not_unlike_them() -> None:
    train = reference(cloud(2_000))
    places = train.place(cloud(500, seed=1))
    assert sum(place.is_unlike for place in places) <= 5
    quantiles = torch.tensor([[p.norm_quantile, p.distance_quantile] for p in places])
    torch.testing.assert_close(quantiles.mean(0), torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "made",
    [
        lambda rows: rows[:100] - rows[100:200],
        lambda rows: torch.randn(100, 64, generator=torch.Generator().manual_seed(2)),
        lambda rows: rows[:1_000].unflatten(0, (100, 10)).mean(1),
        lambda rows: -rows[:100],
    ],
    ids=["differences", "random", "means of ten", "the other way"],
)
def test_what_is_no_activation_is_told(made) -> None:
    train = reference(cloud(2_000))
    assert all(place.is_unlike for place in train.place(made(cloud(1_200, seed=3))))


def test_the_length_alone_makes_no_vector_unlike_the_others() -> None:
    """A verbalizer does not see it."""
    train = reference(cloud(500))
    [place], [longer] = (train.place(cloud(1, seed=4) * factor) for factor in (1.0, 50.0))
    assert longer.norm_quantile == 1.0 > place.norm_quantile
    assert (longer.is_unlike, longer.nearest[0][0]) == (place.is_unlike, place.nearest[0][0])


def test_too_few_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 rows and 1 ids, expected at least 2"):
        TrainActivations(["a"], torch.ones(1, 4), MEAN)


def test_a_sample_of_a_run_is_drawn_from_all_shards(
    ray_cluster: None, tiny_run, publish_corpus
) -> None:
    run = tiny_run()
    publish_corpus(run)
    capture_activations(run)
    train = load_activations(run, "train")
    whole, some = load_train_activations(run), load_train_activations(run, most=4)
    assert sorted(whole._ids) == train.ids and len(some._ids) == 4
    assert {name.partition("#")[0][:1] for name in some._ids} <= {n[:1] for n in train.ids}
    [place] = whole.place(train.vectors[:1])
    same = train.vectors.isclose(train.vectors[:1], atol=1e-5).all(1)
    assert same[train.ids.index(place.nearest[0][0])] and place.nearest[0][1] > 0.999
