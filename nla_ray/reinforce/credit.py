"""Credit: the advantage of every token of a description, from what its beginnings earn.

The reward scorer reads a description as it grows, after each of its lines. So it is known what a
line adds to the reward, and a line is not blamed for the lines after it:

    r_j = reward of the first j lines; a description that has ended keeps its last reward
    m_j = mean of r_j over the group
    V_0 = 0
    V_j = s_j x u x (r_j - m_j)
    V_last = u x (reward - the group's mean reward) = the advantage of the whole description
    advantage of a token of line j = V_j - V_(j-1)

u is the advantage of one unit of reward. s_j is the share of a lead of j lines that is still there
at the end: fitted by least squares to the descriptions of the batch that go on, at least s_(j-1)
and at most 1. Descriptions that have ended stay in the mean, so that no line is compared with
itself alone. Because s does not fall from line to line, a line that adds more than the group does
is never punished for the lead that the lines before it earned. With s = 1 a first line would be
paid for more than lasts: of its lead a quarter does, of two lines' three fifths (nano, 512 rollouts
of the SFT verbalizer on train activations).

Knows texts, ids and numbers only. Protects the rule that credit is shared out and not made: the
advantages of a description's lines add up to the advantage of the description.
Source: generalised advantage estimation (arXiv 1506.02438) with lambda 0, and the reconstructor in
place of a learned value function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nla_ray.base.prompts import CLOSING_TAG, parse_description

_NOTHING = 1e-12
"""A squared spread of rewards below which no reward is better than another."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """One sampled description, cut after each of its lines.

    Example: "- a\\n- b" in the tokens "- a", "\\n", "- b" ->
    beginnings=["- a"], line_of_token=[0, 0, 1].
    """

    beginnings: list[str]
    """The description up to the end of every line but the last, as it is scored."""
    line_of_token: list[int]
    """For every sampled token the index of its line; a line ends with the token that breaks it."""


def cut_lines(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Lines:
    """The lines of sampled ids; blank lines, and breaks after the last line, end nothing.

    >>> spelled = ["- a", "\\n", "- b"]
    >>> cut_lines([0, 1, 2], lambda ids: "".join(spelled[token_id] for token_id in ids))
    Lines(beginnings=['- a'], line_of_token=[0, 0, 1])
    """
    whole, _ = parse_description(decode(token_ids))
    beginnings: list[str] = []
    line_of_token: list[int] = []
    for end, token_id in enumerate(token_ids, start=1):
        line_of_token.append(len(beginnings))
        if "\n" not in decode([token_id]) or CLOSING_TAG in (written := decode(token_ids[:end])):
            continue
        text, _ = parse_description(written)
        if text and text != whole and text not in beginnings[-1:]:
            beginnings.append(text)
    return Lines(beginnings=beginnings, line_of_token=line_of_token)


def line_values(
    advantages: Float[Tensor, " batch"],
    rewards: Sequence[Sequence[float]],
    group_size: int,
    *,
    scaled_by_group: bool = False,
) -> list[Float[Tensor, " _lines"]]:
    """V_1 .. V_last of every description, as in the module's text.

    `advantages`: of whole descriptions, groups of `group_size` in a row. `rewards`: of the first
    line, of the first two, and so on to all of every description. `scaled_by_group`: each group has
    a u of its own.

    >>> line_values(torch.tensor([1.0, -1.0]), [[0.5, 0.75], [0.25]], group_size=2)
    [tensor([0.5000, 1.0000]), tensor([-1.])]
    """
    longest = max(map(len, rewards))
    carried = torch.empty(len(rewards), longest, dtype=advantages.dtype)
    for row, earned in enumerate(rewards):
        carried[row] = torch.tensor([*earned, *[earned[-1]] * (longest - len(earned))])
    grouped = carried.unflatten(0, (-1, group_size))
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1)
    units = _units(advantages, centred[:, -1], group_size if scaled_by_group else len(advantages))
    leads = units[:, None] * centred
    lengths = torch.tensor([len(earned) for earned in rewards])
    beginnings = leads * _lasting_shares(advantages, leads, lengths)
    return [
        torch.cat([beginnings[row, : length - 1], advantages[row : row + 1]])
        for row, length in enumerate(lengths.tolist())
    ]


def _lasting_shares(
    advantages: Float[Tensor, " batch"], leads: Float[Tensor, "batch lines"], lengths: Tensor
) -> Float[Tensor, " lines"]:
    """s_1, s_2, ...: of leads after so many lines, in units of the advantage."""
    shares, share = [], 0.0
    for num_lines, lead in enumerate(leads.T, 1):
        going_on = lengths > num_lines
        ahead = lead[going_on]
        fitted = (advantages[going_on] @ ahead) / ahead.square().sum().clamp_min(_NOTHING)
        share = min(max(share, fitted.item()), 1.0)
        shares.append(share)
    return leads.new_tensor(shares)


def _units(
    advantages: Float[Tensor, " batch"], centred: Float[Tensor, " batch"], size: int
) -> Float[Tensor, " batch"]:
    """u of every description: the advantage of one unit of reward among each `size` in a row.

    `centred`: rewards of whole descriptions less their group's mean. 0 where all of them agree.
    """
    paid, earned = advantages.view(-1, size), centred.view(-1, size)
    units = (paid * earned).sum(1) / earned.square().sum(1).clamp_min(_NOTHING)
    return units.repeat_interleave(size)


def token_advantages(
    values: Sequence[Float[Tensor, " _lines"]], lines: Sequence[Sequence[int]], length: int
) -> Float[Tensor, "batch {length}"]:
    """The advantage of every token: what its line adds to V.

    `lines`: the line of every description's tokens, each description at most `length` tokens;
    behind its end a description has zeros.

    >>> token_advantages([torch.tensor([0.5, 1.5])], [[0, 0, 1]], length=4)
    tensor([[0.5000, 0.5000, 1.0000, 0.0000]])
    """
    shared = torch.zeros(len(values), length)
    for row, of_lines in enumerate(values):
        credits = of_lines.diff(prepend=of_lines.new_zeros(1))
        shared[row, : len(lines[row])] = credits[torch.tensor(lines[row], dtype=torch.int64)]
    return shared


def share_foretold(values: Sequence[Float[Tensor, " _lines"]]) -> float:
    """The share of the advantages' variance that the last beginnings explain, at most 1.

    The beginning of a description of one line explains nothing.
    """
    ends = torch.stack([of_lines[-1] for of_lines in values])
    foretold = torch.stack(
        [of_lines[-2] if len(of_lines) > 1 else of_lines.new_zeros(()) for of_lines in values]
    )
    total = ends.square().sum()
    return (1.0 - (ends - foretold).square().sum() / total).item() if total > 0 else 0.0
