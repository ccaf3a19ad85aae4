"""What the assistant of a chat says about a document, and the expectation over what it may say.

In a chat the user gives a piece of a document and the assistant says what it holds: a list of its
salient words, a label in either offline style, or the kind of document. The target at the
generation prompt is the exact expectation over those answers, and before each further word of a
list it is the words not listed yet, so that neither has sampling noise and a listed word is never a
target again. Knows strings and a function from strings to tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nla_ray.label.cleaner import clean_label
from nla_ray.nano.offline_teachers import ContentFirstTeacher, FormatFirstTeacher, observe
from nla_ray.text.words import WordStatistics

ANSWER_SHARES = {"words": 0.45, "description": 0.35, "domain": 0.20}
"""How often each kind of answer is drawn: its weight in the target at the generation prompt."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the assistant says.

    Example:
        Answer(text="index, frame", listed=[("index", 3.1), ("frame", 4.2)])
    """

    text: str
    listed: list[tuple[str, float]]
    """Salient words in the order they are listed, with their scores; of a list alone."""


def compose_answer(
    text: str,
    domain: str,
    statistics: WordStatistics,
    words: list[tuple[str, float]],
    draw: random.Random,
) -> Answer:
    """One drawn answer about a text with these salient words.

    Words are listed in a random order in which each next word is drawn in proportion to its tf-idf
    among the remaining words (Plackett-Luce): `next_word_shares` is the exact expectation.
    """
    kind = draw.choices(list(ANSWER_SHARES), weights=list(ANSWER_SHARES.values()))[0]
    if kind == "words" and words:
        order = sorted(words, key=lambda pair: -math.log(1.0 - draw.random()) / pair[1])
        return Answer(text=", ".join(word for word, _ in order), listed=order)
    if kind == "description":
        teacher = draw.choice((ContentFirstTeacher, FormatFirstTeacher))(statistics)
        return Answer(text=clean_label(teacher.describe(text, domain)), listed=[])
    return Answer(text=observe(text, domain, statistics).kind, listed=[])


def next_word_shares(remaining: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """How likely each remaining word comes next: its score over the sum of scores.

    >>> next_word_shares([("frame", 3.0), ("index", 1.0)])
    [('frame', 0.75), ('index', 0.25)]
    """
    total = sum(score for _, score in remaining)
    return [(word, score / total) for word, score in remaining]


def prompt_target(
    first_id_of: Callable[[str], int], words: Sequence[tuple[str, float]], kind: str
) -> dict[int, float]:
    """Next-token distribution at the generation prompt: the expectation over what may be said.

    `first_id_of` maps a string to the id of its first token. Returns id -> probability; they sum to
    1.
    """
    without_words = 0.0 if words else ANSWER_SHARES["words"]
    shares = [
        (word, ANSWER_SHARES["words"] * share)
        for word, share in (next_word_shares(words) if words else ())
    ]
    shares.append(("- ", ANSWER_SHARES["description"]))
    shares.append((kind, ANSWER_SHARES["domain"] + without_words))
    return _by_token(first_id_of, shares)


def list_targets(
    encode: Callable[[str], list[int]], listed: Sequence[tuple[str, float]]
) -> list[tuple[int, dict[int, float]]]:
    """The soft targets inside a word list: (index of the comma in the answer's tokens, target).

    A target is the distribution of the words that remain after the comma, id -> probability.
    """
    targets: list[tuple[int, dict[int, float]]] = []
    position = 0
    for index, (word, _) in enumerate(listed[:-1]):
        position += len(encode(f" {word}" if index else word))
        remaining = next_word_shares(listed[index + 1 :])
        shares = [(f" {word}", share) for word, share in remaining]
        targets.append((position, _by_token(lambda string: encode(string)[0], shares)))
        position += 1
    return targets


def _by_token(
    first_id_of: Callable[[str], int], shares: Iterable[tuple[str, float]]
) -> dict[int, float]:
    target: dict[int, float] = {}
    for string, share in shares:
        token = first_id_of(string)
        target[token] = target.get(token, 0.0) + share
    return target
