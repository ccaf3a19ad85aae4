"""Credit by line: descriptions cut by hand, values and advantages computed by hand."""

import pytest
import torch

from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.reinforce.credit import cut_lines, line_values, share_out


def decode(ids) -> str:
    return "".join(map(chr, ids))


def test_a_description_is_cut_after_each_line_but_the_last() -> None:
    lines = cut_lines([ord(letter) for letter in f"- a\n- b\n- c{CLOSING_TAG}"], decode)
    assert lines.beginnings == ["- a", "- a\n- b"]
    assert lines.line_of_token == [0] * 4 + [1] * 4 + [2] * (3 + len(CLOSING_TAG))


@pytest.mark.parametrize(
    "written", [f"- a{CLOSING_TAG}", f"- a\n{CLOSING_TAG}", f"\n- a{CLOSING_TAG}\n- b", "- a", ""]
)
def test_what_is_one_line_is_not_cut(written: str) -> None:
    lines = cut_lines([ord(letter) for letter in written], decode)
    assert lines.beginnings == [] and lines.line_of_token == [0] * len(written)


def test_a_blank_line_ends_nothing() -> None:
    lines = cut_lines([ord(letter) for letter in "- a\n\n- b"], decode)
    assert lines.beginnings == ["- a"] and lines.line_of_token == [0] * 4 + [1] * 4


def test_the_value_of_a_beginning_is_its_score_within_the_group_scaled_to_advantages() -> None:
    values = line_values(
        torch.tensor([1.0, -1.0, 0.5, -0.5]), [[0.6], [0.2], [0.5], [0.5]], group_size=2
    )
    # centred .2, -.2, 0, 0; slope (.2 + .2) / .08 = 5
    torch.testing.assert_close(
        torch.stack(values), torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.5], [0.0, -0.5]])
    )


def test_every_line_is_paid_what_it_adds_and_all_lines_together_the_whole() -> None:
    advantages, scores = torch.tensor([1.0, -1.0]), [[0.3, 0.6], [0.3, 0.2]]
    shared, explained = share_out(
        advantages, scores, [[0, 0, 1, 2], [0, 1, 2, 2]], group_size=2, length=5
    )
    torch.testing.assert_close(
        shared, torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0, 0.0]])
    )
    assert explained == pytest.approx(1.0)


def test_beginnings_that_score_alike_pay_the_last_line_and_those_that_differ_the_first() -> None:
    advantages, scores = torch.tensor([1.0, -1.0, 2.0, -2.0]), [[0.6], [0.2], [0.5], [0.5]]
    shared, explained = share_out(advantages, scores, [[0, 1]] * 4, group_size=2, length=2)
    # slope 5: the first group's beginnings are worth 1 and -1, the second's nothing
    torch.testing.assert_close(
        shared, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    )
    assert explained == pytest.approx(2 / 10)


def test_beginnings_that_foretell_nothing_leave_the_last_line_the_whole_advantage() -> None:
    shared, explained = share_out(
        torch.tensor([1.0, -1.0]), [[0.4], [0.4]], [[0, 1], [0, 1]], group_size=2, length=2
    )
    torch.testing.assert_close(shared, torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert explained == 0.0


def test_descriptions_of_one_line_are_paid_as_a_whole() -> None:
    shared, _ = share_out(
        torch.tensor([1.0, -1.0]), [[], []], [[0, 0], [0]], group_size=2, length=3
    )
    torch.testing.assert_close(shared, torch.tensor([[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]))


def test_a_line_is_compared_with_those_of_the_group_that_have_it() -> None:
    values = line_values(torch.tensor([1.0, -1.0, 0.0]), [[0.6], [0.2], []], group_size=3)
    torch.testing.assert_close(torch.cat(values), torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]))
