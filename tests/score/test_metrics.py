"""Figures with numbers worked out by hand, pairs with wrong rows, the bootstrap over families."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import (
    Comparisons,
    derangement,
    document_rows,
    family_pairs,
    hard_rows,
    nearest_rows,
    other_rows,
    rows_of_neither,
)
from nla_ray.score.metrics import METRICS, RETRIEVAL_SIZES, Figure, chances, figures, retrieval

ORIGINALS = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0]])
RECONSTRUCTIONS = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
COMPARISONS = Comparisons(
    pool=ORIGINALS,
    rows=torch.arange(3),
    document_others=torch.tensor([[2], [-1], [0]]),
    mean=torch.tensor([0.0, 0.5]),
    wrong=torch.tensor([1, 2, 0]),
    others=torch.tensor([[1, 2], [0, 2], [0, 1]]),
    hard_others=torch.tensor([[1], [2], [0]]),
)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("correct_cosine", 0.5690356),  # (1 + 1/sqrt 2 + 0) / 3
        ("garbage_cosine", -0.2357023),  # (0 - 1/sqrt 2 + 0) / 3
        ("delta", 0.8047379),
        ("top1", 2 / 3),  # the third is a tie: 0 against 0
        ("top1_2way", 2 / 3),  # 1 > -0.447; 0.281 > -0.984; a tie at -0.447
        ("centred_cosine", 0.2779570),  # (1 + 0.2810846 - 0.4472136) / 3
        ("top1_10way", 1 / 3),  # ranks 1, 2, 3
        ("mrr_10way", 0.6111111),  # (1 + 1/2 + 1/3) / 3
        ("top1_10way_hard", 2 / 3),  # 1 > -0.447; 0.281 > -0.984; a tie at -0.447
        ("top1_document", 1 / 2),  # of the two rows with another position: 1 > -1 and a tie
        ("fve", 0.0303301),  # 1 - (0 + 2 - sqrt 2 + 2) / (10/9 + 4/9 + 10/9)
        ("directional_error", 0.4309644),  # 1 - correct cosine
        # mean |v| = 11/6: r = (11/6, 0), 11/6 (1, 1)/sqrt 2, (0, 11/6); mean v = (1/3, 1/6)
        ("raw_error", 0.8600237),
        ("magnitude", 0.4696387),  # |r| = 2, sqrt 2, 3 against |v| = 3, 1/2, 2
    ],
)
def test_each_figure_equals_the_number_worked_out_by_hand(metric: str, expected: float) -> None:
    assert figures(RECONSTRUCTIONS, COMPARISONS)[metric].value == pytest.approx(expected, abs=1e-6)


def test_all_metrics_are_reported_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(120, 4, generator=generator)
    comparisons = Comparisons.draw(
        originals, [f"d{row // 2}" for row in range(120)], torch.zeros(4), seed=0
    )
    assert tuple(figures(originals, comparisons)) == tuple(METRICS)
    assert "top1_100way" not in figures(RECONSTRUCTIONS, COMPARISONS)


def test_figures_of_direction_do_not_depend_on_the_length_of_any_vector() -> None:
    scaled = dataclasses.replace(COMPARISONS, pool=ORIGINALS * torch.tensor([[7.0], [0.1], [90.0]]))
    before, after = figures(RECONSTRUCTIONS, COMPARISONS), figures(RECONSTRUCTIONS * 13, scaled)
    for name in set(METRICS) & set(after) - {"raw_error", "magnitude"}:
        assert after[name].value == pytest.approx(before[name].value, abs=1e-6)


def test_the_raw_error_knows_no_length_of_reconstructions_and_one_of_activations_counts() -> None:
    originals = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1.0
    comparisons = Comparisons.draw(originals, [f"d{row}" for row in range(50)], torch.zeros(6), 0)
    lengths = originals.norm(dim=1, keepdim=True)
    perfect_direction = figures(originals / lengths, comparisons)
    expected = (originals / lengths * lengths.mean() - originals).square().sum()
    spread = (originals - originals.mean(0)).square().sum()
    assert perfect_direction["raw_error"].value == pytest.approx((expected / spread).item())
    assert perfect_direction["directional_error"].value == pytest.approx(0.0, abs=1e-6)
    assert perfect_direction["magnitude"].value == 0.0
    mean_activation = figures(originals.mean(0).expand(50, 6), comparisons)
    assert mean_activation["magnitude"].value == 0.0 and mean_activation["raw_error"].value > 1.0
    assert figures(2 * originals, comparisons)["magnitude"].value == pytest.approx(1.0)
    longer = figures(originals * torch.rand(50, 1, generator=torch.Generator()), comparisons)
    assert longer["raw_error"].value == pytest.approx(perfect_direction["raw_error"].value)


def test_an_activation_near_the_mean_wins_the_raw_choice_and_not_the_centred_one() -> None:
    mean, right, near_the_mean = (
        torch.tensor([1.0, 0.0, 0.0]),
        torch.tensor([0.6, 0.8, 0.0]),
        torch.tensor([0.99, 0.0, 0.14]),
    )
    comparisons = dataclasses.replace(
        COMPARISONS,
        pool=torch.stack([right, near_the_mean]),
        rows=torch.tensor([0]),
        mean=mean,
        wrong=torch.tensor([1]),
        others=torch.tensor([[1]]),
        hard_others=torch.tensor([[1]]),
        document_others=torch.tensor([[-1]]),
    )
    result = figures(
        torch.tensor([[0.97, 0.24, 0.0]]), comparisons
    )  # leaves the mean the way the right one does, but not as far
    assert result["top1"].value == 0.0 and result["top1_2way"].value == 1.0


def test_perfect_reconstructions_reach_every_ceiling() -> None:
    originals = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    comparisons = Comparisons.draw(
        originals, [f"d{row}" for row in range(40)], torch.zeros(8), seed=0
    )
    result = figures(5 * originals, comparisons)
    for name in ("correct_cosine", "top1", "centred_cosine", "top1_10way", "mrr_10way", "fve"):
        assert result[name].value == pytest.approx(1.0, abs=1e-5)


def test_a_constant_reconstruction_earns_chance_and_the_train_mean_itself_earns_nothing() -> None:
    originals = torch.randn(2_000, 8, generator=torch.Generator().manual_seed(0)) + 2.0
    mean = torch.full((8,), 0.3)
    comparisons = Comparisons.draw(originals, [f"d{row}" for row in range(2_000)], mean, seed=0)
    constant = figures(
        torch.randn(8, generator=torch.Generator().manual_seed(1)).expand(2_000, 8), comparisons
    )
    assert constant["top1"].value == pytest.approx(0.5, abs=0.04)
    assert constant["top1_10way"].value == pytest.approx(0.1, abs=0.03)
    assert constant["delta"].value == pytest.approx(0.0, abs=1e-6)
    zero = figures(torch.zeros(2_000, 8), comparisons)
    assert zero["top1"].value == 0.0 and zero["correct_cosine"].value == 0.0


def test_reconstructions_of_another_shape_or_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each original"):
        figures(RECONSTRUCTIONS[:2], COMPARISONS)
    with pytest.raises(RuntimeError, match="not finite"):
        figures(RECONSTRUCTIONS * float("nan"), COMPARISONS)


def test_a_derangement_pairs_every_row_with_another_document_and_each_row_once() -> None:
    doc_ids = ["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d"]
    for seed in range(50):
        wrong = derangement(doc_ids, seed).tolist()
        assert sorted(wrong) == list(range(11))
        assert all(doc_ids[row] != doc_ids[other] for row, other in enumerate(wrong))
    assert derangement(doc_ids, 3).tolist() == derangement(doc_ids, 3).tolist()
    assert any(
        derangement(doc_ids, 0).tolist() != derangement(doc_ids, seed).tolist()
        for seed in range(1, 9)
    )


def test_a_derangement_needs_other_documents() -> None:
    with pytest.raises(ValueError, match="half of the rows"):
        derangement(["a", "a", "b"], 0)


def test_other_rows_are_distinct_and_from_other_documents() -> None:
    doc_ids = [f"d{row // 3}" for row in range(30)]
    others = other_rows(doc_ids, 9, seed=0)
    assert others.shape == (30, 9)
    for row, chosen in enumerate(others.tolist()):
        assert len(set(chosen)) == 9 and all(doc_ids[other] != doc_ids[row] for other in chosen)
    with pytest.raises(ValueError, match="expected at least 9"):
        other_rows(["a", "b", "c"], 9, seed=0)


def test_pairs_are_of_two_families_and_a_pass_has_every_row_once_on_either_side() -> None:
    families = [f"f{row // 3}" for row in range(12)]
    firsts, seconds = family_pairs(families, 30, seed=0)
    assert all(families[a] != families[b] for a, b in zip(firsts, seconds, strict=True))
    for rows in (firsts[:12], seconds[:12], firsts[12:24], seconds[12:24]):
        assert sorted(rows) == list(range(12))
    assert len(set(firsts[24:])) == 6 and (firsts, seconds) == family_pairs(families, 30, seed=0)
    assert (firsts, seconds) != family_pairs(families, 30, seed=1)


def test_rows_of_neither_are_distinct_and_of_a_third_family() -> None:
    families = [f"f{row // 3}" for row in range(12)]
    others = rows_of_neither(families, [0, 5], [11, 7], 6, seed=0)
    assert sorted(others[0].tolist()) == [3, 4, 5, 6, 7, 8]
    assert sorted(others[1].tolist()) == [0, 1, 2, 9, 10, 11]
    with pytest.raises(ValueError, match="got 6 outside its two families, expected at least 7"):
        rows_of_neither(families, [0], [11], 7, seed=0)


def test_hard_rows_are_the_nearest_of_the_domain_then_of_the_others_and_never_of_the_document() -> (
    None
):
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    originals = torch.stack([angles.cos(), angles.sin()], dim=1)
    hard = hard_rows(
        originals,
        ["a", "a", "b", "c", "d", "e"],
        ["x", "x", "y", "x", "x", "y"],
        torch.zeros(2),
        num_others=3,
    )
    assert hard[0].tolist() == [
        3,
        4,
        2,
    ]  # same domain first, nearest first, then the nearest of another; row 1 is its document
    assert hard[5].tolist() == [2, 4, 3]


def test_no_wrong_row_is_of_the_same_family_and_other_rows_of_a_document_stay_its_own() -> None:
    doc_ids = [f"d{row // 2}" for row in range(60)]
    family_ids = [f"f{row // 6}" for row in range(60)]
    originals = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    drawn = Comparisons.draw(originals, doc_ids, torch.zeros(4), 0, family_ids=family_ids)
    compared = torch.cat([drawn.wrong[:, None], drawn.others, drawn.hard_others], dim=1)
    for row, others in enumerate(compared.tolist()):
        assert family_ids[row] not in {family_ids[other] for other in others}
    assert drawn.others.shape == (60, 54)
    assert drawn.document_others.tolist() == [[row + 1 - 2 * (row % 2)] for row in range(60)]


def test_the_nearest_row_is_by_centred_cosine_across_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    candidates, mean = (
        torch.randn(2_500, 6, generator=generator),
        torch.randn(6, generator=generator) / 10,
    )
    queries = candidates[[3, 1_500, 2_499]] * 2.0
    assert nearest_rows(queries, candidates, mean).tolist() == [3, 1_500, 2_499]


def test_the_bootstrap_of_two_families_has_three_outcomes() -> None:
    # a, a, a are right and b is wrong: resamples aa, ab, bb give 1, 3/4, 0
    bootstrap = FamilyBootstrap(["a", "a", "a", "b"], 2_000, seed=0)
    interval = bootstrap.intervals({"x": Figure.mean([1, 1, 1, 0])})["x"]
    assert (interval.value, interval.low, interval.high, interval.n, interval.families) == (
        0.75,
        0.0,
        1.0,
        4,
        2,
    )


def test_a_figure_counts_the_rows_and_families_that_it_says_something_of() -> None:
    some, all_rows = (
        Figure(
            numerator=torch.tensor([1.0, 0.0, 0.0, 0.0]),
            denominator=torch.tensor([1.0, 1.0, 0.0, 0.0]),
        ),
        Figure.mean([1, 0, 1, 0]),
    )
    bootstrap = FamilyBootstrap(["a", "a", "b", "c"], 200, seed=0)
    told = bootstrap.intervals({"some": some, "all": all_rows})
    assert (told["some"].n, told["some"].families) == (2, 1) and (
        told["all"].n,
        told["all"].families,
    ) == (4, 3)
    paired = bootstrap.differences(
        {"x": some},
        {"x": Figure(numerator=torch.zeros(4), denominator=torch.tensor([0.0, 0.0, 0.0, 1.0]))},
    )["x"]
    assert (paired.n, paired.families) == (3, 2)


def test_one_document_gives_an_interval_of_no_width() -> None:
    interval = FamilyBootstrap(["a", "a"], 100, seed=0).intervals({"x": Figure.mean([1, 0])})["x"]
    assert interval.low == interval.value == interval.high == 0.5


def test_the_interval_of_a_share_matches_the_normal_approximation() -> None:
    right = torch.arange(400) % 10 != 0
    interval = FamilyBootstrap([f"d{row}" for row in range(400)], 10_000, seed=1).intervals(
        {"x": Figure.mean(right)}
    )["x"]
    assert interval.value == pytest.approx(0.9)
    assert interval.low == pytest.approx(0.9 - 0.0294, abs=0.004)  # 1.96 sqrt(0.9 * 0.1 / 400)
    assert interval.high == pytest.approx(0.9 + 0.0294, abs=0.004)


def test_copies_of_a_row_inside_its_document_do_not_narrow_the_interval() -> None:
    values = (torch.arange(100) % 4 != 0).double()
    once = FamilyBootstrap([f"d{row}" for row in range(100)], 2_000, seed=0).intervals(
        {"x": Figure.mean(values)}
    )["x"]
    copies = FamilyBootstrap([f"d{row // 5}" for row in range(500)], 2_000, seed=0).intervals(
        {"x": Figure.mean(values.repeat_interleave(5))}
    )["x"]
    assert (once.low, once.high) == pytest.approx((copies.low, copies.high))


def test_a_ratio_is_recomputed_on_every_resample_as_a_slow_loop_does() -> None:
    generator = torch.Generator().manual_seed(2)
    doc_ids = [f"d{row % 7}" for row in range(30)]
    figure = Figure(
        torch.randn(30, generator=generator).double(),
        torch.rand(30, generator=generator).double() + 0.1,
    )
    bootstrap = FamilyBootstrap(doc_ids, 200, seed=5)
    expected = []
    for counts in bootstrap._counts.tolist():
        assert sum(counts) == 7
        weights = [counts[int(doc_id[1:])] for doc_id in doc_ids]
        expected.append(
            sum(w * x for w, x in zip(weights, figure.numerator.tolist(), strict=True))
            / sum(w * x for w, x in zip(weights, figure.denominator.tolist(), strict=True))
        )
    torch.testing.assert_close(
        bootstrap._sample([figure])[0], torch.tensor(expected, dtype=torch.float64)
    )


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    bootstrap = FamilyBootstrap([f"d{row}" for row in range(300)], 2_000, seed=0)
    better, worse = {"x": Figure.mean(noise + 0.1)}, {"x": Figure.mean(noise)}
    paired = bootstrap.differences(better, worse)["x"]
    assert paired.value == pytest.approx(0.1)
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))
    assert bootstrap.intervals(better)["x"].low < bootstrap.intervals(worse)["x"].high


def test_an_undefined_figure_is_an_error_and_not_a_number() -> None:
    bootstrap = FamilyBootstrap(["a", "b"], 10, seed=0)
    with pytest.raises(ValueError, match="denominator of 0"):
        bootstrap.intervals({"fve": Figure(torch.zeros(2).double(), torch.zeros(2).double())})
    with pytest.raises(ValueError, match="no rows"):
        FamilyBootstrap([])


def test_ten_thousand_resamples_of_a_whole_table_take_little_time_and_memory() -> None:
    doc_ids = [f"d{row // 2}" for row in range(1_400)]
    table = {f"m{number}": Figure.mean(torch.rand(1_400)) for number in range(100)}
    intervals = FamilyBootstrap(doc_ids).intervals(table)
    assert len(intervals) == 100 and all(
        interval.low < interval.value < interval.high for interval in intervals.values()
    )


# More choices -------------------------------------------------------------------------------------


def test_the_retrieval_curve_falls_with_the_size_and_holds_the_ten_way_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(150, 16, generator=generator)
    comparisons = Comparisons.draw(
        originals, [f"d{row}" for row in range(150)], torch.zeros(16), seed=0
    )
    reconstructions = originals + 2 * torch.randn(150, 16, generator=generator)
    curve = retrieval(reconstructions, comparisons)
    values = [figure.value for figure in curve.values()]
    assert (
        tuple(curve) == RETRIEVAL_SIZES
        and values == sorted(values, reverse=True)
        and values[0] > values[-1]
    )
    named = figures(reconstructions, comparisons)
    assert (
        curve[10].value == named["top1_10way"].value
        and curve[100].value == named["top1_100way"].value
    )


def test_other_positions_of_a_document_are_its_other_rows() -> None:
    assert document_rows(["a", "b", "a", "a"]).tolist() == [[2, 3], [-1, -1], [0, 3], [0, 2]]
    assert document_rows(["a", "b"]).shape == (2, 0)


def test_some_rows_have_the_figures_that_they_have_among_all() -> None:
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(40, 8, generator=generator)
    comparisons = Comparisons.draw(
        originals, [f"d{row // 2}" for row in range(40)], torch.zeros(8), seed=0
    )
    reconstructions = originals + torch.randn(40, 8, generator=generator)
    places = torch.tensor([3, 17, 30])
    some = figures(reconstructions[places], comparisons.at(places))
    for name, figure in figures(reconstructions, comparisons).items():
        # relative to the spread of the rows that are compared
        if name not in ("fve", "raw_error", "magnitude"):
            torch.testing.assert_close(some[name].numerator, figure.numerator[places])


def test_chances_are_those_of_the_choices() -> None:
    chance = chances(COMPARISONS)
    assert (
        chance["top1"] == chance["top1_2way"] == 0.5
        and chance["top1_10way"] == 0.1
        and chance["mrr_10way"] == pytest.approx(0.2928968)
    )
    assert chance["top1_document"] == 0.5  # two rows have one other position each


def test_a_ratio_and_a_difference_are_paired_on_the_same_resamples() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5
    bootstrap = FamilyBootstrap([f"d{row}" for row in range(50)], 400, 0)
    ratio = bootstrap.ratios({"x": Figure.mean(3 * values)}, {"x": Figure.mean(values)})["x"]
    assert (
        ratio.value == pytest.approx(3.0)
        and ratio.low == pytest.approx(3.0)
        and ratio.high == pytest.approx(3.0)
    )
