"""Credit by claim: the tokens that claim a word are paid for the word, found in the text or not.

    value of a claim = weight x (1 - p) where the text has the word, weight x -p where it has not
    weight = log(N / texts that have the word) / log(N), of the N train texts of the schedule
    value of a claim that was made before = -1

p is the precision from which claiming pays: saying a word that is right less often than that costs
more than silence, which earns nothing. A word that is said again says nothing: it costs as much as
a word can, however common. Words of many texts weigh little, so that naming what every text has is
no way to be right. The value goes to the tokens of the claim and to those between it and the claim
before in the same line, where it was decided to go on; that of a repeat to its own tokens, since
another word might have stood there. Knows texts and ids only. Source: the score of a binary
forecast that is decided at p, of which all proper scores are mixtures: Schervish, "A general method
for comparing probability assessors", 1989.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nla_ray.base.encoding import token_ends
from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.score import claims

_REPEATED = -1.0


@dataclass(frozen=True, kw_only=True)
class ClaimPrices:
    """What a claim is worth.

    >>> prices = ClaimPrices.of(["the frame", "a frame", "a licence", "b"], precision=0.75)
    >>> prices.value("licence", found=True), prices.value("frame", found=False)
    (0.25, -0.375)
    """

    num_texts: int
    counts: Mapping[str, int]
    """Texts that have a word."""
    precision: float
    """p."""

    @classmethod
    def of(cls, texts: Iterable[str], precision: float) -> ClaimPrices:
        """Count words in texts: the caller passes train texts only."""
        counts: Counter[str] = Counter()
        num_texts = 0
        for text in texts:
            num_texts += 1
            counts.update(claims.found_words(text))
        return cls(num_texts=num_texts, counts=counts, precision=precision)

    def value(self, word: str, *, found: bool) -> float:
        """A word that no text has weighs as much as one that a single text has.

        A quotation weighs as much as its rarest word.
        """
        total = max(2, self.num_texts)
        count = min((self.counts.get(part, 0) for part in _words_in(word)), default=0)
        weight = math.log(total / max(1, count)) / math.log(total)
        return weight * (1 - self.precision if found else -self.precision)


def claim_values(
    token_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    source: str,
    prices: ClaimPrices,
    without: str = "",
) -> list[float]:
    """The value of the claim that every sampled token belongs to; 0 for tokens of none.

    `without`: of a difference the text of its second activation. A word that this has as well is
    none that tells the two apart, and counts as not found.

    >>> spelled = ["- tokens:", " frame", ",", " index"]
    >>> prices = ClaimPrices.of(["frame", "index"], precision=0.5)
    >>> claim_values([0, 1, 2, 3], lambda ids: "".join(spelled[i] for i in ids), "x frame", prices)
    [0.0, 0.5, -0.5, -0.5]
    """
    written = decode(token_ids)
    ends = token_ends(token_ids, decode)
    values = [0.0] * len(token_ids)
    text = written.partition(CLOSING_TAG)[0]
    for begin, end, value in _valued_spans(text, source, without, prices):
        for number, (first, last) in enumerate(pairwise(ends)):
            if first < end and last > begin:
                values[number] += value
    return values


def _words_in(claim: str) -> frozenset[str]:
    """The words of a quotation, or the claim itself where it is one word or none."""
    is_phrase = not claim.isalnum()
    return (claims.found_words(claim) if is_phrase else frozenset()) or frozenset([claim])


def _valued_spans(
    text: str, source: str, without: str, prices: ClaimPrices
) -> Iterator[tuple[int, int, float]]:
    """(begin, end, value) of every claim, in characters; it begins where the one before ends."""
    said: set[str] = set()
    offset, reached = 0, None
    for piece, mark in claims.marked(text, source, without):
        end = offset + len(piece)
        if mark:
            word = claims.claim_of(piece)
            begin = offset if reached is None else reached
            if _words_in(word) <= said:
                yield offset, end, _REPEATED
            else:
                yield begin, end, prices.value(word, found=mark == "found")
            said |= _words_in(word)
            reached = end
        elif "\n" in piece:
            reached = None
        offset = end
