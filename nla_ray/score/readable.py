"""A label without what cannot be read in its activation, so that it teaches nothing to invent.

An item of a list is readable where each of its words is likely to be in the text for whoever sees
the activation alone. A line of prose says what the text is about and what comes next, in words of
its own; it is readable where its specifics are: quotations, numbers and names that stand in the
text. What is not readable is dropped, or replaced by words of the text that are, to which more may
be added that the teacher left out; the last line of prose is kept without its specifics. Pure: it
is given labels and probabilities. Protects the rule that a label stays honest: every word that it
adds is in the text. Numbers and quotations are read by no probe.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nla_ray.score import claims

LABEL_FORMS = ("readable", "replaced", "thinned")
"""What a label is rewritten to: fields of `Rewritten`."""
_PROSE_WORDS = 3
"""Words in place of a line of prose."""
_OTHER, _PROSE = "other", "prose"


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A label in three forms, and how many of its items could not be read.

    Example: Rewritten(readable="- tokens: frame", replaced="- tokens: frame, index",
    thinned="- tokens: licence", items=2, unreadable=1)
    """

    readable: str
    """Unreadable items are dropped."""
    replaced: str
    """In their place, and beside them, stand readable words of the text, where there are any."""
    thinned: str
    """As many items are dropped at random: what dropping itself is worth."""
    items: int
    """Items of lists that claim something of the text, and lines of prose with specifics."""
    unreadable: int


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One thing that a label says: an item of the list of its line, or the line itself."""

    line: int
    text: str
    claimed: frozenset[str]
    judged: frozenset[str]
    """What of it must be readable: of a line of prose its specifics, else all that it claims."""
    place: str
    """`tokens`, `other` for a list under another heading, or `prose`."""


def places_of(labels: Iterable[str]) -> dict[str, str]:
    """The place where labels name a word most often: `tokens`, `other` (another list) or `prose`.

    >>> places_of(["- tokens: frame\\n- unit test: index"])
    {'frame': 'tokens', 'index': 'other'}
    """
    named: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        for item in _all_items(claims.bullets(label)):
            for word in item.claimed:
                named[word][item.place] += 1
    return {word: places.most_common(1)[0][0] for word, places in named.items()}


def offered_words(
    in_text: Collection[str], probability: Mapping[str, float], share: Mapping[str, float]
) -> list[str]:
    """Words of a text that an activation tells of, those that tell most first.

    That is p log(1 / share): how likely the word is, times what it says of a text where it stands.
    `share`: of all texts that have the word. The likeliest words alone would be those of most
    texts.

    >>> offered_words(["the", "frame"], {"the": 1.0, "frame": 0.5}, {"the": 0.9, "frame": 0.1})
    ['frame', 'the']
    """
    telling = {
        word: probability[word] * -math.log(share[word]) for word in in_text if word in probability
    }
    return sorted(telling, key=lambda word: (-telling[word], word))


def rewrite(
    label: str,
    probability: Mapping[str, float],
    offers: Sequence[str],
    places: Mapping[str, str],
    *,
    least: float,
    seed: int,
    fill_to: int = 0,
) -> Rewritten:
    """The forms of a label.

    `probability`: of words to be in the text; of others it is 0. `offers`: words of the text, best
    first. `places`: of words, see `places_of`. `least`: the probability from which a word is
    readable. `fill_to`: claims up to which readable words are added. Where nothing is readable, and
    no prose is left, the best word of the text is taken all the same: silence teaches nothing.

    >>> read = {"frame": 0.9, "index": 0.8}
    >>> made = rewrite("- tokens: frame, licence", read, ["frame", "index"], {}, least=0.5, seed=0)
    >>> made.readable, made.replaced, made.unreadable
    ('- tokens: frame', '- tokens: frame, index', 1)
    """
    lines = claims.bullets(label)
    items = _all_items(lines)
    claiming = [number for number, item in enumerate(items) if item.judged]
    likely = {word for word, value in probability.items() if value >= least}
    dropped = [number for number in claiming if not _is_readable(items[number], likely, offers)]
    thinned = random.Random(seed).sample(claiming, len(dropped))
    kept = _last_prose(items, dropped)
    said = {word for number in claiming if number not in dropped for word in items[number].judged}
    taken = said | {item.text.casefold() for item in items if not item.claimed}
    left = [word for word in offers if word not in taken]
    has_prose = any(
        item.place == _PROSE and (number in kept or number not in dropped)
        for number, item in enumerate(items)
    )
    replaced: dict[int, str] = dict(kept)
    spare: list[str] = []
    for number in dropped:
        chosen = _fitting(items[number], [word for word in left if word in likely], places)
        if not chosen and not said and not has_prose and number == dropped[-1]:
            chosen = left[:1]
        if items[number].place == _PROSE:
            spare += chosen
        else:
            replaced[number] = ", ".join(chosen)
        said.update(chosen)
        left = [word for word in left if word not in chosen]
    spare += [word for word in left if word in likely][: max(0, fill_to - len(said))]
    return Rewritten(
        readable=_written(lines, items, dict.fromkeys(dropped, "") | kept),
        replaced=_written(lines, items, dict.fromkeys(dropped, "") | replaced, spare, offers),
        thinned=_written(lines, items, dict.fromkeys(thinned, "") | _last_prose(items, thinned)),
        items=len(claiming),
        unreadable=len(dropped),
    )


def _last_prose(items: Sequence[_Item], dropped: Collection[int]) -> dict[int, str]:
    """What is left of the line of prose with the fewest specifics, where all lines are dropped."""
    prose = [number for number, item in enumerate(items) if item.place == _PROSE]
    if not prose or not set(prose) <= set(dropped):
        return {}
    number = min(prose, key=lambda number: len(items[number].judged))
    left = claims.strip_specifics(items[number].text)
    return {number: left} if len(left.split()) > 1 else {}


def _fitting(item: _Item, readable: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """Readable words for an item's place: its own first; a word of no label is one of `tokens`."""

    def is_elsewhere(word: str) -> bool:
        return item.place not in (places.get(word, claims.TOKENS_HEADING), _PROSE)

    most = _PROSE_WORDS if item.place == _PROSE else 1
    return sorted(readable, key=is_elsewhere)[: min(most, len(item.judged))]


def leave_out(description: str, unwanted: Collection[str]) -> str:
    """The description without the items of lists, and the lines of prose, that claim any of these.

    >>> leave_out("- tokens: frame, licence\\n- next: another check", ["licence"])
    '- tokens: frame\\n- next: another check'
    """
    lines = claims.bullets(description)
    items = _all_items(lines)
    dropped = [number for number, item in enumerate(items) if item.claimed & set(unwanted)]
    return _written(lines, items, dict.fromkeys(dropped, "")) if dropped else description


def label_difference(first: str, second: str) -> str:
    """What the first label says and the second does not, item by item and line by line.

    A line of prose stays where it stands in the first label alone, unless the second says all of
    its specifics. A heading stays for its list; a forecast that both make is left out.

    >>> label_difference("- tokens: frame, index\\n- next: more", "- tokens: index\\n- next: more")
    '- tokens: frame'
    """
    shared, said = set(claims.bullets(second)), claims.claimed_words(second)
    lines = [line for line in claims.bullets(first) if line not in shared]
    items = _all_items(lines)
    dropped = [number for number, item in enumerate(items) if _is_said(item, said)]
    return _written(lines, items, dict.fromkeys(dropped, ""))


def _is_said(item: _Item, said: frozenset[str]) -> bool:
    """Whether a label that says these words says the item, or the specifics of a line of prose."""
    return bool(item.judged) and item.judged <= said


def _all_items(lines: Sequence[str]) -> list[_Item]:
    return [item for number, line in enumerate(lines) for item in _items(number, line)]


def _items(number: int, line: str) -> list[_Item]:
    heading, body = claims.split_heading(line)
    if not heading:
        claimed, judged = claims.claimed_words(f"- {line}"), claims.specifics(f"- {line}")
        return [_Item(line=number, text=line, claimed=claimed, judged=judged, place=_PROSE)]
    is_tokens = heading.casefold() == claims.TOKENS_HEADING
    place = claims.TOKENS_HEADING if is_tokens else _OTHER
    found = []
    for part in claims.list_parts(body):
        claimed = claims.claimed_words(f"- {heading}: {part}")
        text = part.strip()
        found.append(_Item(line=number, text=text, claimed=claimed, judged=claimed, place=place))
    return found


def _is_readable(item: _Item, likely: Collection[str], in_text: Collection[str]) -> bool:
    """Whether all that is judged is likely, and in prose true: lists name words of the text."""
    return all(word in likely and (item.place != _PROSE or word in in_text) for word in item.judged)


def _written(
    lines: Sequence[str],
    items: Sequence[_Item],
    changed: Mapping[int, str],
    added: Sequence[str] = (),
    order: Sequence[str] = (),
) -> str:
    """The label with some items, by number, in other words; without those that are empty.

    `added`: further words for the list of tokens. Tokens are listed as they stand in `order`.
    """
    spare = list(added)
    has_tokens = any(item.place == claims.TOKENS_HEADING for item in items)
    written: list[str] = []
    for number, line in enumerate(lines):
        of_line = [index for index, item in enumerate(items) if item.line == number]
        said = [text for index in of_line if (text := changed.get(index, items[index].text))]
        heading, _ = claims.split_heading(line)
        if not heading:
            written += [f"- {text}" for text in said]
            continue
        if items[of_line[0]].place == claims.TOKENS_HEADING:
            said, spare = _listed(said, spare, order), []
        elif spare and not has_tokens and heading.casefold() == claims.NEXT_HEADING:
            written.append(f"- {claims.TOKENS_HEADING}: {', '.join(spare)}")
            spare = []
        written.append(f"- {heading}: {', '.join(said) or claims.PLACEHOLDERS[0]}")
    if spare or not written:
        listed = ", ".join(spare) or claims.PLACEHOLDERS[0]
        written.append(f"- {claims.TOKENS_HEADING}: {listed}")
    return "\n".join(written)


def _listed(said: Sequence[str], added: Sequence[str], order: Sequence[str]) -> list[str]:
    """A list of tokens with further ones, in this order; what is not in it comes last."""
    rank = {word: number for number, word in enumerate(order)}
    kept = [text for text in said if not (added and text in claims.PLACEHOLDERS)]
    return sorted([*kept, *added], key=lambda text: rank.get(text.casefold(), len(rank)))
