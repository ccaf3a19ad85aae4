"""Reward terms with numbers computed by hand, the draw of wrong activations, the schedule."""

import dataclasses

import pytest
import torch

from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.reinforce import rewards
from nla_ray.settings.config import GRPOSettings


def test_contrast_subtracts_the_mean_of_the_wrong_scores() -> None:
    right = torch.tensor([0.6, 0.2])
    wrong = torch.tensor([[0.1, 0.3], [0.5, 0.5]])
    torch.testing.assert_close(rewards.contrast(right, wrong), torch.tensor([0.4, -0.3]))


def test_a_description_that_fits_every_activation_alike_earns_nothing() -> None:
    assert rewards.contrast(torch.tensor([0.98]), torch.full((1, 8), 0.98)).item() == pytest.approx(
        0.0
    )


def test_a_good_description_has_no_penalty_and_its_share_of_evidence() -> None:
    written = f"- Python test: frame, index\n- tokens: assert, dtype{CLOSING_TAG}"
    terms = rewards.text_terms(written, 20, "assert frame.dtype == int", soft_max_tokens=56)
    assert terms == {
        "unclosed": 0.0,
        "empty": 0.0,
        "over_length": 0.0,
        "repeated": 0.0,
        "evidence": 0.75,
    }


def test_of_a_difference_what_the_second_text_has_too_is_no_evidence() -> None:
    written, first, second = f"- tokens: frame, index{CLOSING_TAG}", "frame[index]", "an index"
    terms = rewards.text_terms(written, 9, first, soft_max_tokens=56, without=second)
    assert terms["evidence"] == 0.5
    settings = GRPOSettings(evidence_weight=0.1)
    assert rewards.beginning_worth("- tokens: frame, index", first, settings, second) == 0.05


def test_an_unclosed_repeating_over_long_description_has_all_three_penalties() -> None:
    terms = rewards.text_terms(
        "- tokens: assert, dtype, assert", 60, "nothing of it", soft_max_tokens=56
    )
    assert terms == {
        "unclosed": 1.0,
        "empty": 0.0,
        "over_length": 4.0,
        "repeated": 1.0,
        "evidence": 0.0,
    }


def test_an_empty_description_is_closed_and_empty() -> None:
    terms = rewards.text_terms(f" \n{CLOSING_TAG}", 2, "text", soft_max_tokens=56)
    assert (terms["unclosed"], terms["empty"], terms["evidence"]) == (0.0, 1.0, 0.0)


def test_the_weighted_sum_of_the_terms_is_the_reward_computed_by_hand() -> None:
    settings = GRPOSettings(
        unclosed_penalty=0.3,
        empty_penalty=0.25,
        repeat_penalty=0.2,
        length_penalty=0.01,
        evidence_weight=0.1,
    )
    terms = {
        "score": 0.5,
        "unclosed": 1.0,
        "empty": 0.0,
        "over_length": 4.0,
        "repeated": 1.0,
        "evidence": 0.5,
    }
    weights = rewards.reward_weights(settings)
    assert weights.keys() == {rewards.SCORE, *rewards.TEXT_TERMS}
    assert sum(weights[name] * value for name, value in terms.items()) == pytest.approx(
        0.5 - 0.3 - 0.04 - 0.2 + 0.05
    )


def test_the_worth_of_a_beginning_is_its_evidence_less_what_it_repeats() -> None:
    settings = GRPOSettings(repeat_penalty=0.2, evidence_weight=0.1)
    assert rewards.beginning_worth(
        "- tokens: frame, index", "the index of it", settings
    ) == pytest.approx(0.05)
    assert rewards.beginning_worth(
        "- tokens: index, index", "the index of it", settings
    ) == pytest.approx(0.1 - 0.2)


def test_wrong_activations_come_from_other_documents_and_differ_from_each_other() -> None:
    documents = [f"doc{row // 5}" for row in range(40)]
    wrong = rewards.WrongActivations(documents, count=8)
    for row in range(40):
        drawn = wrong.draw(row, seed=0, step=3)
        assert len(set(drawn)) == 8
        assert documents[row] not in {documents[wrong_row] for wrong_row in drawn}


def test_wrong_activations_are_redrawn_every_step_and_repeat_for_the_same_step() -> None:
    wrong = rewards.WrongActivations([f"doc{row}" for row in range(100)], count=4)
    assert wrong.draw(7, seed=0, step=1) == wrong.draw(7, seed=0, step=1)
    draws = {tuple(wrong.draw(7, seed=0, step=step)) for step in range(20)}
    assert len(draws) == 20
    assert wrong.draw(7, seed=1, step=1) != wrong.draw(7, seed=0, step=1)


def test_every_row_of_the_other_documents_can_be_drawn() -> None:
    wrong = rewards.WrongActivations(["a", "a", "b", "c", "d"], count=3)
    assert {drawn for step in range(10) for drawn in wrong.draw(0, seed=0, step=step)} == {2, 3, 4}


def test_too_few_other_documents_is_one_clear_error() -> None:
    with pytest.raises(
        ValueError, match=r"got 2 rows from other families.*expected at least 3.*num-wrong"
    ):
        rewards.WrongActivations(["a", "a", "b", "c", "a"], count=3)


def test_the_schedule_passes_over_all_rows_before_it_repeats_one() -> None:
    batches = rewards.schedule_rows(num_rows=10, prompts_per_step=3, num_batches=7, seed=0)
    assert [len(batch) for batch in batches] == [3] * 7
    assert all(len(set(batch)) == 3 for batch in batches)
    first_pass = [row for batch in batches[:3] for row in batch]
    assert len(set(first_pass)) == 9
    assert batches[:3] != batches[3:6]


def test_a_longer_schedule_begins_with_the_shorter_one() -> None:
    assert rewards.schedule_rows(10, 3, 7, seed=0)[:4] == rewards.schedule_rows(10, 3, 4, seed=0)


def test_a_bank_smaller_than_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2, expected at least 3.*prompts-per-step"):
        rewards.schedule_rows(2, 3, 1, seed=0)


def test_the_default_evidence_weight_is_zero() -> None:
    assert rewards.reward_weights(GRPOSettings())["evidence"] == 0.0
    assert (
        rewards.reward_weights(dataclasses.replace(GRPOSettings(), evidence_weight=0.2))["evidence"]
        == 0.2
    )


def test_near_rows_are_drawn_beside_the_others_anew_every_step() -> None:
    documents = [f"doc{row}" for row in range(60)]
    near = [[(row + step) % 60 for step in range(1, 9)] for row in range(60)]
    wrong = rewards.WrongActivations(documents, 3, near, 2)
    draws = [wrong.draw(5, seed=0, step=step) for step in range(20)]
    assert all(
        len(drawn) == 5 and set(drawn[3:]) <= set(near[5]) and len(set(drawn[3:])) == 2
        for drawn in draws
    )
    assert (
        draws[0] == wrong.draw(5, seed=0, step=0) and len({tuple(drawn[3:]) for drawn in draws}) > 5
    )
    # those of any document are the same whether near ones are drawn too
    assert draws[0][:3] == rewards.WrongActivations(documents, 3).draw(5, seed=0, step=0)
    with pytest.raises(ValueError, match="8 near ones, expected at least 3 and 9"):
        rewards.WrongActivations(documents, 3, near, 9)
