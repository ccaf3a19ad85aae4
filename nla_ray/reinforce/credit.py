"""Which part of a description earned its reward: the advantage of every token, from what the
description's beginnings earn.

A description is read by the reward scorer as it grows, after each of its lines. What a line adds to
the reward is known then, and the luck of the lines after it need not be blamed on it:

    V_0 = 0,   V_j = b_j x (reward of the first j lines - its mean over the group),   V_last = the
               description's own advantage
    advantage of a token of line j = V_j - V_(j-1)

b_j is fitted to each batch: how much the reward of j lines foretells of the advantage. Knows texts,
ids and numbers only.
Source: generalised advantage estimation (arXiv 1506.02438) with lambda 0, and the reconstructor in
place of a learned value function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_ray.base.prompts import CLOSING_TAG, parse_description

_NOTHING = 1e-12
"""A spread of rewards below which beginnings say nothing of advantages."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """One sampled description, cut after each of its lines.

    Example: "- a\\n- b" in the tokens "- a", "\\n", "- b" -> beginnings=["- a"], line_of_token=[0,
    0, 1].
    """

    beginnings: list[str]
    """The description up to the end of every line but the last, as it is scored."""
    line_of_token: list[int]
    """For every sampled token the index of its line; a line's last token is the one that breaks
    it."""


def cut_lines(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Lines:
    """The lines of sampled ids. Blank lines, and breaks after the last line, end nothing."""
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
    advantages: Tensor,
    rewards: Sequence[Sequence[float]],
    lines: Sequence[Sequence[int]],
    group_size: int,
    length: int,
) -> tuple[Tensor, float]:
    """The advantage of every token, [n, length], zero behind a description's end; and how much
    beginnings foretell.

    `advantages`: [n], of whole descriptions, groups of `group_size` in a row. `rewards`: of each
    one's beginnings; `lines`: the line of each of its tokens. The second value is the share of the
    advantages' variance that the last beginnings explain.
    """
    values = line_values(advantages, rewards, group_size)
    shared = torch.zeros(len(advantages), length, dtype=advantages.dtype)
    explained = torch.zeros(len(advantages), dtype=advantages.dtype)
    for row, own in enumerate(values):
        credits = own.diff(prepend=own.new_zeros(1))
        shared[row, : len(lines[row])] = credits[torch.tensor(lines[row], dtype=torch.int64)]
        explained[row] = own[-2] if len(own) > 1 else 0.0
    total = advantages.square().sum()
    left = (advantages - explained).square().sum()
    return shared, (1.0 - left / total).item() if total > 0 else 0.0


def line_values(
    advantages: Tensor, rewards: Sequence[Sequence[float]], group_size: int
) -> list[Tensor]:
    """V_1 .. V_last of every description, see the module's text. Beginnings of a group are compared
    as far as they go.

    Example: advantages [1, -1] of one group, rewards [[0.6], [0.2]] -> centred [0.2, -0.2], b = 5,
    V = [[1, 1], [-1, -1]].
    """
    told = torch.full((len(rewards), max(map(len, rewards))), float("nan"), dtype=advantages.dtype)
    for row, own in enumerate(rewards):
        told[row, : len(own)] = torch.tensor(own)
    grouped = told.unflatten(0, (-1, group_size))
    centred = (grouped - grouped.nanmean(1, keepdim=True)).flatten(0, 1).nan_to_num()
    slopes = (advantages[:, None] * centred).sum(0) / centred.square().sum(0).clamp_min(_NOTHING)
    return [
        torch.cat([(slopes * centred[row])[: len(own)], advantages[row : row + 1]])
        for row, own in enumerate(rewards)
    ]
