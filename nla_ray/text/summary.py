"""An extractive summary of a text: its sentences, those with the most telling words first.

It invents nothing, so it is what a description could say at best. Deterministic; it knows nothing
of tokens: who wants a length cuts. Source: Luhn, "The Automatic Creation of Literature Abstracts",
1958 (sentences weighed by their words); words are weighed by inverse document frequency.
"""

from __future__ import annotations

import re

from nla_ray.text.words import WordStatistics, split_words

_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+")


def extract_summary(text: str, statistics: WordStatistics) -> str:
    """All sentences of the text (or lines of code), a line each, best first.

    A sentence is worth the mean log(N / df) of its words; equal ones stay in the text's order.
    """
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]
    return "\n".join(sorted(sentences, key=lambda part: -_weight(part, statistics)))


def _weight(sentence: str, statistics: WordStatistics) -> float:
    words = split_words(sentence)
    return sum(map(statistics.inverse_frequency, words)) / len(words) if words else 0.0
