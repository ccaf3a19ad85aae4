"""Credit by line: descriptions cut by hand, values and advantages computed by hand."""

from pathlib import Path

import pytest
import torch
from ranks import on_ranks, value_lines

from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.reinforce.credit import cut_lines, line_values, share_foretold, token_advantages


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


def credits_of(values: torch.Tensor) -> torch.Tensor:
    """What every line is paid: the differences of its description's values, from 0."""
    return values.diff(prepend=torch.zeros(1))


def test_a_line_that_raised_the_reward_is_not_punished_because_no_other_has_as_many_lines() -> None:
    first, *others = line_values(
        torch.tensor([1.2, -0.4, -0.4, -0.4]),
        [[0.6, 0.62, 0.6], [0.2, 0.2], [0.2, 0.2], [0.2, 0.2]],
        group_size=4,
    )
    # whole rewards less .3: .3, -.1, -.1, -.1; u = 4. Means of one line .3, of two .305.
    torch.testing.assert_close(credits_of(first), torch.tensor([1.2, 0.06, -0.06]))
    for values in others:
        torch.testing.assert_close(values, torch.tensor([-0.4, -0.4]))


def test_a_beginning_is_worth_the_share_of_its_lead_that_lasts() -> None:
    values = line_values(
        torch.tensor([1.0, -1.0, 0.5, -0.5]),
        [[1.0, 0.75], [0.0, 0.25], [0.2, 0.6], [0.7, 0.35]],
        group_size=2,
    )
    # u = 4; leads 2, -2, -1, 1; s = (2 + 2 - .5 - .5) / (4 + 4 + 1 + 1) = .3
    expected = torch.tensor([[0.6, 1.0], [-0.6, -1.0], [-0.3, 0.5], [0.3, -0.5]])
    torch.testing.assert_close(torch.stack(values), expected)


def test_the_share_that_lasts_is_at_most_one_and_does_not_fall_from_line_to_line() -> None:
    lasting, _ = line_values(torch.tensor([1.0, -1.0]), [[0.5, 0.7], [0.4, 0.2]], group_size=2)
    # u = 4, lead .2: the fit is 5
    torch.testing.assert_close(lasting, torch.tensor([0.2, 1.0]))
    falling, _ = line_values(
        torch.tensor([1.0, -1.0]), [[0.95, 1.2, 0.7], [-0.05, -0.3, 0.2]], group_size=2
    )
    # leads 2 and 3: the fits are 1/2, then 1/3
    torch.testing.assert_close(falling, torch.tensor([1.0, 1.5, 1.0]))


def test_a_line_that_adds_more_than_the_group_is_not_punished_for_the_lead_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for _ in range(50):
        rewards = torch.rand(8, 4, generator=generator)
        groups = rewards.view(2, 4, 4)
        leads = (groups - groups.mean(1, keepdim=True)).flatten(0, 1)
        values = line_values(leads[:, -1], rewards.tolist(), group_size=4)
        for lead, of_lines in zip(leads, values, strict=True):
            adds_to_a_lead = (lead[:-1] > 0) & (lead.diff() > 0)
            checked += int(adds_to_a_lead.sum())
            assert (credits_of(of_lines)[1:][adds_to_a_lead] >= -1e-6).all()
    assert checked > 100


def test_a_description_that_has_ended_keeps_its_reward_in_the_groups_mean() -> None:
    long, short = line_values(torch.tensor([2.0, -2.0]), [[0.5, 0.8], [0.4]], group_size=2)
    # u = 2 / .2 = 10; the mean of one line is .45
    torch.testing.assert_close(long, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(short, torch.tensor([-2.0]))


def test_lines_differ_in_pay_where_whole_descriptions_of_a_group_agree() -> None:
    values = line_values(
        torch.tensor([3.0, -3.0, 0.0, 0.0]),
        [[0.9, 0.9], [0.3, 0.3], [0.7, 0.5], [0.4, 0.5]],
        group_size=2,
    )
    # u = 3 / .3 = 10 in both groups; leads 3, -3, 1.5, -1.5; s = 18 / 22.5
    torch.testing.assert_close(values[2], torch.tensor([1.2, 0.0]))
    torch.testing.assert_close(values[3], torch.tensor([-1.2, 0.0]))


def test_where_advantages_are_scaled_by_group_lines_are_too() -> None:
    values = line_values(
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        [[0.6, 0.6], [0.2, 0.2], [0.7, 0.5], [0.5, 0.4]],
        group_size=2,
        scaled_by_group=True,
    )
    # u = 5, then 20: leads 1 and 2; s = 6 / 10
    torch.testing.assert_close(values[0], torch.tensor([0.6, 1.0]))
    torch.testing.assert_close(values[2], torch.tensor([1.2, 1.0]))


def test_rewards_that_all_agree_pay_nothing() -> None:
    values = line_values(torch.zeros(2), [[0.1, 0.5], [0.3, 0.5]], group_size=2)
    torch.testing.assert_close(torch.stack(values), torch.zeros(2, 2))


def test_four_workers_of_one_batch_know_the_values_that_one_worker_knows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = [torch.rand(2 + row % 2, generator=generator).tolist() for row in range(16)]
    whole = torch.tensor([earned[-1] for earned in rewards]).view(4, 4)
    whole[3] = 0.5  # the last worker's descriptions all earn the same
    for earned, reward in zip(rewards, whole.flatten().tolist(), strict=True):
        earned[-1] = reward
    advantages = ((whole - whole.mean(1, keepdim=True)) / whole.std()).flatten()
    alone = line_values(advantages, rewards, group_size=4)
    parts = []
    for rows in torch.arange(16).chunk(4):
        parts.append((advantages[rows], [rewards[row] for row in rows]))
    for values in on_ranks(value_lines, tmp_path, parts):
        torch.testing.assert_close(values, alone)


def test_the_lines_of_a_description_are_paid_its_advantage_together() -> None:
    values = line_values(
        torch.tensor([1.0, -0.6, -0.4]), [[0.2, 0.5, 0.9], [0.6, 0.1], [0.2]], group_size=3
    )
    paid = torch.stack([credits_of(of_lines).sum() for of_lines in values])
    torch.testing.assert_close(paid, torch.tensor([1.0, -0.6, -0.4]))


def test_every_token_is_paid_what_its_line_adds_and_nothing_comes_behind_the_end() -> None:
    shared = token_advantages(
        [torch.tensor([0.5, 1.5, 1.0]), torch.tensor([-1.0])], [[0, 0, 1, 2], [0, 0]], length=5
    )
    torch.testing.assert_close(
        shared, torch.tensor([[0.5, 0.5, 1.0, -0.5, 0.0], [-1.0, -1.0, 0.0, 0.0, 0.0]])
    )


def test_the_share_foretold_is_what_the_last_beginnings_explain_of_the_advantages() -> None:
    values = [torch.tensor([0.5, 1.0]), torch.tensor([-1.0]), torch.tensor([0.0, 2.0, 2.0])]
    # left over: .5, -1, 0 of advantages 1, -1, 2
    assert share_foretold(values) == pytest.approx(1 - 1.25 / 6)
    assert share_foretold([torch.tensor([0.3, 0.0])]) == 0.0
