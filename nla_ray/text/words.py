"""Words of texts: how often they occur in a corpus, and which of them stand out in one text.

The offline teachers write with them, the embedded base was pretrained with them (STOP_WORDS must
not change), and the report asks how many of them a description names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

MIN_DOCUMENT_FREQUENCY = 15
"""A rarer word is one that a small model cannot learn to name."""
MAX_DOCUMENT_SHARE = 0.25
"""A word in more than a quarter of all documents says nothing about one of them."""
BANDS = ((0.74, 1.0), (0.40, 0.55), (0.0, 0.22))
"""Where a label's words come from: a word of each band, of the broad one as topic, else as tokens.

A band is a range of shares: the tellable words in order of document frequency, weighted by it. A
writer that decides word after word must not name a word twice. It cannot if every position of a
list has its own vocabulary; the gaps keep a word near a border from fitting two positions. Measured
after supervised training of the embedded default on its validation texts: with the seven best words
of a text, in the order of the alphabet or of frequency, 99% of the descriptions repeat a word; with
a word of each of five adjacent bands 48%, of three 16%, of these three 6%.
"""

STOP_WORDS = frozenset(
    """
    the and for that this with from are was were will would can could should may might must not
    but its has have had been being than then them they their there these those which what when
    where who whom whose how why all any some such only own same other each few more most very
    too also into onto over under out off about above below after before between through during
    until while because both either neither nor you your yours our ours his her him she one two
    use used using does did done let get got just here see per via etc self cls none true false
    def return import class elif else pass lambda yield try except finally raise isinstance len
    str int bool
    """.split()
)
"""Words that say nothing about a text. The shipped base was pretrained with exactly these."""

_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True, kw_only=True)
class WordStatistics:
    """Document frequencies over the train texts: all that a teacher knows apart from the text.

    >>> WordStatistics.fit(["the frame", "frame index", "index, index"])
    WordStatistics(num_documents=3, document_frequency={'frame': 2, 'index': 2})
    """

    num_documents: int
    document_frequency: dict[str, int]

    @classmethod
    def fit(cls, texts: Iterable[str]) -> WordStatistics:
        """Count in how many of the texts each word occurs. The caller passes train texts only."""
        counts: Counter[str] = Counter()
        num_documents = 0
        for text in texts:
            num_documents += 1
            counts.update(set(split_words(text)))
        return cls(num_documents=num_documents, document_frequency=dict(counts))

    def inverse_frequency(self, word: str) -> float:
        """log(N / df), or 0 for a word that is too rare or too common to name."""
        frequency = self.document_frequency.get(word, 0)
        # In a small corpus (a user's hundred texts) 15 would leave nothing: at least 1, at most 15.
        floor = min(MIN_DOCUMENT_FREQUENCY, 1 + self.num_documents // 200)
        if frequency < floor or frequency > max(MAX_DOCUMENT_SHARE * self.num_documents, floor):
            return 0.0
        return math.log(self.num_documents / frequency)

    @cached_property
    def band_of(self) -> dict[str, int]:
        """Word -> index of its band in BANDS, for the words that lie in one."""
        tellable = [word for word in self.document_frequency if self.inverse_frequency(word) > 0.0]
        tellable.sort(key=lambda word: (self.document_frequency[word], word))
        total = sum(self.document_frequency[word] for word in tellable)
        bands, passed = {}, 0
        for word in tellable:
            share = (passed + self.document_frequency[word] / 2) / total
            passed += self.document_frequency[word]
            for index, (low, high) in enumerate(BANDS):
                if low <= share < high:
                    bands[word] = index
        return bands


def split_words(text: str) -> list[str]:
    """Lower-case word pieces of 3 to 18 letters in order, stop words left out.

    Identifiers are cut at `_`, digits and camelCase.

    >>> split_words("readFrameIndex(df_test, x1)")
    ['read', 'frame', 'index', 'test']
    """
    pieces = (piece.lower() for piece in _PIECE.findall(text))
    return [piece for piece in pieces if 3 <= len(piece) <= 18 and piece not in STOP_WORDS]


def salient_words(
    text: str, statistics: WordStatistics, limit: int | None = None
) -> list[tuple[str, float]]:
    """Words of the text with their tf-idf, highest first, each once: all, or `limit` of them.

    tf-idf = (1 + log tf) * log(N / df). Ties go to the word that comes first in the alphabet. A
    plural beside its singular is dropped, so that a short list does not say one thing twice.
    """
    counts = Counter(split_words(text))
    scored = [
        (word, (1.0 + math.log(count)) * statistics.inverse_frequency(word))
        for word, count in counts.items()
    ]
    tellable = [(word, score) for word, score in scored if score > 0.0]
    ranked = sorted(tellable, key=lambda pair: (-pair[1], pair[0]))
    chosen: dict[str, float] = {}
    for word, score in ranked:
        if word + "s" not in chosen and (not word.endswith("s") or word[:-1] not in chosen):
            chosen[word] = score
        if len(chosen) == limit:
            break
    return list(chosen.items())
