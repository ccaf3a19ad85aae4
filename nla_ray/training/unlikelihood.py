"""What a verbalizer is taught not to write: an item of a list that it has said before.

A list is written word after word, and the likeliest word stays the likeliest once it is said. No
label says an item twice, but that alone teaches little against it. So the beginnings of labels are
read a second time, up to where a further item stands or a further one might have been added: the
token by which an earlier item began is to become unlikely there. Source: unlikelihood training,
Welleck et al., "Neural text generation with unlikelihood training", 2020; there it is taught
wherever a label goes on, against all tokens that stood before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_ray.base.encoding import token_ends
from nla_ray.score.claims import item_spans

IGNORED = -100
"""Label of a token without loss. A lower one, `refused(token)`, says: any token but this one."""
_HIGHEST_LOG_PROB = -1e-6
"""A token that is certain is refused as one that is nearly so: the loss stays finite."""
_SEPARATOR = ", "


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


def refusal_loss(log_probs: Tensor) -> Tensor:
    """-log(1 - p) of tokens that are refused, in nats; finite, as its gradient, for every p."""
    return -torch.log1p(-log_probs.clamp(max=_HIGHEST_LOG_PROB).exp())


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """A label up to a place where an item could stand, and an earlier one that is to stay away.

    Example: Repeat(number=4, written="- tokens: frame, ", item="frame", expected="index")
    """

    number: int
    """Of the label."""
    written: str
    item: str
    expected: str
    """The item that stands there; empty where the list has ended."""


def draw_repeats(labels: Sequence[str], share: float, seed: int) -> list[Repeat]:
    """Repeats of `share` as many labels as there are, drawn by seed; none of labels without a list.

    >>> [repeat] = draw_repeats(["- tokens: frame"], 1.0, seed=0)
    >>> repeat.written, repeat.item, repeat.expected
    ('- tokens: frame, ', 'frame', '')
    """
    draw = random.Random(seed)
    wanted = round(share * len(labels))
    if not wanted:
        return []
    numbers = [number for number, label in enumerate(labels) if any(_repeats(number, label))]
    drawn: list[int] = []
    while numbers and len(drawn) < wanted:  # each pass draws every label once
        drawn += draw.sample(numbers, min(len(numbers), wanted - len(drawn)))
    return [draw.choice([*_repeats(number, labels[number])]) for number in drawn]


def _repeats(number: int, label: str) -> Iterator[Repeat]:
    """One for every place of an item and every different item before it."""
    earlier: list[str] = []
    for spans in item_spans(label):
        end = spans[-1][1]
        places = [(label[:begin], label[begin:last]) for begin, last in spans]
        for written, expected in [*places, (label[:end] + _SEPARATOR, "")]:
            for item in dict.fromkeys(earlier):
                if item != expected:
                    yield Repeat(number=number, written=written, item=item, expected=expected)
            earlier += [expected] if expected else []


def refuse(
    repeats: Sequence[Repeat],
    encode: Callable[[Sequence[str]], list[list[int]]],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[tuple[int, list[int], list[int]]]:
    """(number of the label, ids, labels) of every repeat; its last token alone has a label.

    None of a repeat that begins with the same token as what is to stand there, or of which the
    tokenizer leaves nothing. An item begins where what is written before it ends once decoded: a
    tokenizer that composes characters makes that shorter.
    """
    ids_before = encode([repeat.written for repeat in repeats])
    ids_of_items = encode([repeat.written + repeat.item for repeat in repeats])
    ids_expected = encode([repeat.written + repeat.expected for repeat in repeats])
    for repeat, before, ids, expected in zip(
        repeats, ids_before, ids_of_items, ids_expected, strict=True
    ):
        begin, ends = len(decode(before)), token_ends(ids, decode)[1:]
        first = next((place for place, end in enumerate(ends) if end > begin), None)
        if first is None or (repeat.expected and ids[: first + 1] == expected[: first + 1]):
            continue
        yield repeat.number, ids[: first + 1], [*[IGNORED] * first, refused(ids[first])]
