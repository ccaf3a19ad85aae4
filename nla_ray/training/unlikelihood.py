"""What a verbalizer is taught not to write: an item of a list that it has said before.

A list is written word after word, and the likeliest word stays the likeliest once it is said. No
label says an item twice, but that alone teaches little against it. So labels are read a second time
where each further item begins, with a token by which an earlier one began: its probability is to
fall. Source: unlikelihood training, Welleck et al., "Neural text generation with unlikelihood
training", 2020; there the tokens are all that stood before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nla_ray.base.encoding import token_ends
from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.score.claims import item_starts

IGNORED = -100
"""Label of a token without loss. A lower one, `refused(token)`, says: any token but this one."""
_HIGHEST_LOG_PROB = -1e-6
"""A token that is certain is refused as one that is nearly so: the loss stays finite."""


def refused(token_id: int) -> int:
    """The label that refuses a token.

    >>> refused(0), refused(7)
    (-101, -108)
    """
    return IGNORED - 1 - token_id


def token_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as a model takes them, and where they are of tokens that are refused; shapes stay.

    >>> token_labels(torch.tensor([-100, 5, -108]))
    (tensor([-100,    5,    7]), tensor([False, False,  True]))
    """
    is_refused = labels < IGNORED
    return torch.where(is_refused, IGNORED - 1 - labels, labels), is_refused


def unlikelihood(log_probs: Tensor) -> Tensor:
    """-log(1 - p), in nats, of tokens that are not to be written."""
    return -torch.log1p(-log_probs.clamp(max=_HIGHEST_LOG_PROB).exp())


def refuse_repeats(
    examples: Sequence[Mapping[str, list[int]]],
    share: float,
    decode: Callable[[Sequence[int]], str],
    seed: int,
) -> list[dict[str, list[int]]]:
    """`share` as many examples as there are, drawn by seed, with labels that refuse repeats alone.

    Labels without a second item are not drawn from; where all are, none is made.
    """
    draw = random.Random(seed)
    made: list[dict[str, list[int]]] = []
    wanted = round(share * len(examples))
    while len(made) < wanted:
        found = []
        for number in draw.sample(range(len(examples)), len(examples)):
            if len(made) + len(found) == wanted:
                break
            labels = _refusals(examples[number]["labels"], decode, draw)
            if labels is not None:
                found.append({**examples[number], "labels": labels})
        if not found:
            break
        made += found
    return made


def _refusals(
    labels: Sequence[int], decode: Callable[[Sequence[int]], str], draw: random.Random
) -> list[int] | None:
    """Labels that refuse, where an item begins, the first token of an earlier one; None if none."""
    start = next(number for number, label in enumerate(labels) if label != IGNORED)
    written = decode(labels[start:]).partition(CLOSING_TAG)[0]
    ends = token_ends(labels[start:], decode)
    begins: list[int] = []
    refusals = [IGNORED] * len(labels)
    for character in item_starts(written):
        position = start + next(number for number, end in enumerate(ends[1:]) if end > character)
        earlier = {labels[begin] for begin in begins} - {labels[position]}
        if earlier:
            refusals[position] = refused(draw.choice(sorted(earlier)))
        begins.append(position)
    return refusals if any(label != IGNORED for label in refusals) else None
