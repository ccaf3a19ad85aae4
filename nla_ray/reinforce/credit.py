"""Credit: the advantage of every token of a description, from what its beginnings earn.

The reward scorer reads a description as it grows, after each of its lines. So it is known what a
line adds to the reward, and a line is not blamed for the lines after it:

    V_0 = 0
    V_j = b_j x (reward of the first j lines - its mean over the group)
    V_last = the advantage of the whole description
    advantage of a token of line j = V_j - V_(j-1)

b_j is fitted to each batch: how much the reward of j lines foretells of the advantage. Knows texts,
ids and numbers only. Protects the rule that credit is shared out and not made: the advantages of a
description's lines add up to the advantage of the description.
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
"""A squared spread of rewards below which beginnings foretell nothing."""


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


def share_out(
    advantages: Float[Tensor, " batch"],
    rewards: Sequence[Sequence[float]],
    lines: Sequence[Sequence[int]],
    group_size: int,
    length: int,
) -> tuple[Float[Tensor, "batch {length}"], float]:
    """The advantage of every token, [batch, length]; and how much beginnings foretell.

    `advantages`: of whole descriptions, groups of `group_size` in a row. `rewards`: of every
    description's beginnings. `lines`: of every description's tokens, each below `length`; behind
    its end a description has zeros. The second value is the share of the advantages' variance that
    the last beginnings explain, at most 1.
    """
    shared = torch.zeros(len(advantages), length, dtype=advantages.dtype)
    explained = torch.zeros(len(advantages), dtype=advantages.dtype)
    for row, values in enumerate(line_values(advantages, rewards, group_size)):
        credits = values.diff(prepend=values.new_zeros(1))
        shared[row, : len(lines[row])] = credits[torch.tensor(lines[row], dtype=torch.int64)]
        explained[row] = values[-2] if len(values) > 1 else 0.0
    total = advantages.square().sum()
    left = (advantages - explained).square().sum()
    return shared, (1.0 - left / total).item() if total > 0 else 0.0


def line_values(
    advantages: Float[Tensor, " batch"], rewards: Sequence[Sequence[float]], group_size: int
) -> list[Float[Tensor, " _lines"]]:
    """V_1 .. V_last of every description, as in the module's text.

    Beginnings of j lines are compared with those of j lines in the group. Centred rewards of the
    example: [0.25, -0.25], so b is 4.

    >>> line_values(torch.tensor([1.0, -1.0]), [[0.75], [0.25]], group_size=2)
    [tensor([1., 1.]), tensor([-1., -1.])]
    """
    longest = max(map(len, rewards))
    by_line = torch.full((len(rewards), longest), float("nan"), dtype=advantages.dtype)
    for row, earned in enumerate(rewards):
        by_line[row, : len(earned)] = torch.tensor(earned)
    grouped = by_line.unflatten(0, (-1, group_size))
    centred = (grouped - grouped.nanmean(1, keepdim=True)).flatten(0, 1).nan_to_num()
    slopes = (advantages[:, None] * centred).sum(0) / centred.square().sum(0).clamp_min(_NOTHING)
    values = []
    for row, earned in enumerate(rewards):
        foretold = (slopes * centred[row])[: len(earned)]
        values.append(torch.cat([foretold, advantages[row : row + 1]]))
    return values
