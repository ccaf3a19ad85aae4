"""A label without what cannot be read in its activation, so that it teaches nothing to invent.

An item of a list, or a line of prose, is readable where its claims are: where each word of the item
(half of the words of the line) is likely to be in the text for whoever sees the activation alone.
What is not readable is dropped, or replaced by words of the text that are. Pure: it is given labels
and probabilities. Protects the rule that a label stays honest: every word that it adds is in the
text, and it adds no more words than it drops. Numbers and quotations are read by no probe: they are
dropped.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nla_ray.score import claims

LABEL_FORMS = ("readable", "replaced", "thinned")
"""What a label is rewritten to: fields of `Rewritten`."""
_PROSE_WORDS = 3
"""Words in place of a line of prose."""
_LEAST_LABELS = 3
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
    """In their place stand readable words of the text, where there are any; tokens are listed with
    the most common first."""
    thinned: str
    """As many items are dropped at random: what dropping itself is worth."""
    items: int
    """Items of lists and lines of prose that claim something of the text."""
    unreadable: int


@dataclass(frozen=True, kw_only=True)
class LabelWords:
    """The words that labels use, by the place where they name them most often.

    Scorers have learned to read these and no others, and a writer that decides word after word
    repeats itself less where every place has words of its own.

    Example: LabelWords(place_of={"frame": "tokens", "index": "other"}, counts={"frame": 3, ...})
    """

    place_of: Mapping[str, str]
    counts: Mapping[str, int]
    """Labels that name a word."""

    @classmethod
    def of(cls, labels: Iterable[str]) -> LabelWords:
        """Count in labels of train texts; a word that fewer than _LEAST_LABELS name is left out."""
        named: dict[str, Counter[str]] = defaultdict(Counter)
        for label in labels:
            lines = enumerate(claims.bullets(label))
            items = [item for number, line in lines for item in _items(number, line)]
            for word, place in {(word, item.place) for item in items for word in item.claimed}:
                named[word][place] += 1
        counts = {word: places.total() for word, places in named.items()}
        kept = {word for word, count in counts.items() if count >= _LEAST_LABELS}
        return cls(
            place_of={word: named[word].most_common(1)[0][0] for word in kept},
            counts={word: counts[word] for word in kept},
        )


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One thing that a label says: an item of the list of its line, or the line itself."""

    line: int
    text: str
    claimed: frozenset[str]
    place: str
    """`tokens`, `other` for a list under another heading, or `prose`."""


def rewrite(
    label: str,
    probability: Mapping[str, float],
    offers: Sequence[str],
    words: LabelWords,
    least: float,
    seed: int,
) -> Rewritten:
    """The forms of a label.

    `probability`: of words to be in the text; of others it is 0. `offers`: words of the text, most
    likely first. `least`: the probability from which a word is readable. Where nothing is readable
    the likeliest word of the text is taken all the same: silence teaches nothing.

    >>> words = LabelWords.of(["- tokens: frame, index"] * 3)
    >>> read = {"frame": 0.9, "index": 0.8}
    >>> made = rewrite("- tokens: frame, licence", read, ["frame", "index"], words, 0.5, 0)
    >>> made.readable, made.replaced, made.unreadable
    ('- tokens: frame', '- tokens: frame, index', 1)
    """
    lines = claims.bullets(label)
    items = [item for number, line in enumerate(lines) for item in _items(number, line)]
    claiming = [number for number, item in enumerate(items) if item.claimed]
    dropped = [number for number in claiming if not _is_readable(items[number], probability, least)]
    thinned = random.Random(seed).sample(claiming, len(dropped))
    said = {word for number in claiming if number not in dropped for word in items[number].claimed}
    taken = said | {item.text.casefold() for item in items if not item.claimed}
    left = [word for word in offers if word not in taken and word in words.place_of]
    replaced: dict[int, str] = {}
    for number in dropped:
        place = items[number].place
        fitting = sorted(left, key=lambda word: place not in (words.place_of[word], _PROSE))
        readable = [word for word in fitting if probability.get(word, 0.0) >= least]
        most = _PROSE_WORDS if place == _PROSE else 1
        chosen = readable[: min(most, len(items[number].claimed))]
        if not chosen and not said and number == dropped[-1]:
            chosen = left[:1]
        replaced[number] = ", ".join(chosen)
        said.update(chosen)
        left = [word for word in left if word not in chosen]
    return Rewritten(
        readable=_written(lines, items, dict.fromkeys(dropped, "")),
        replaced=_written(lines, items, replaced, words.counts),
        thinned=_written(lines, items, dict.fromkeys(thinned, "")),
        items=len(claiming),
        unreadable=len(dropped),
    )


def _items(number: int, line: str) -> list[_Item]:
    heading, body = claims.split_heading(line)
    if not heading:
        claimed = claims.claimed_words(f"- {line}")
        return [_Item(line=number, text=line, claimed=claimed, place=_PROSE)]
    is_tokens = heading.casefold() == claims.TOKENS_HEADING
    place = claims.TOKENS_HEADING if is_tokens else _OTHER
    found = []
    for part in claims.list_parts(body):
        claimed = claims.claimed_words(f"- {heading}: {part}")
        found.append(_Item(line=number, text=part.strip(), claimed=claimed, place=place))
    return found


def _is_readable(item: _Item, probability: Mapping[str, float], least: float) -> bool:
    readable = [probability.get(word, 0.0) >= least for word in item.claimed]
    return 2 * sum(readable) >= len(readable) if item.place == _PROSE else all(readable)


def _written(
    lines: Sequence[str],
    items: Sequence[_Item],
    changed: Mapping[int, str],
    counts: Mapping[str, int] | None = None,
) -> str:
    """The label with some items, by number, in other words; without those that are empty.

    With `counts` a list of tokens has its most common words first.
    """
    written = []
    for number, line in enumerate(lines):
        of_line = [index for index, item in enumerate(items) if item.line == number]
        said = [text for index in of_line if (text := changed.get(index, items[index].text))]
        heading, _ = claims.split_heading(line)
        if heading:
            if counts is not None and items[of_line[0]].place == claims.TOKENS_HEADING:
                said.sort(key=lambda word: -counts.get(word.casefold(), 0))
            written.append(f"- {heading}: {', '.join(said) or claims.PLACEHOLDERS[0]}")
        elif said:
            is_new = said[0] != line
            written.append(f"- {claims.TOKENS_HEADING}: {said[0]}" if is_new else f"- {line}")
    return "\n".join(written) or f"- {claims.TOKENS_HEADING}: {claims.PLACEHOLDERS[0]}"
