"""Two deterministic teachers that need neither a network nor a key, and are named as offline.

They describe a text by three facts that can be checked against it: what it is about (the domain and
its most telling words), which words stand out, and which form of continuation its end asks for. The
two differ in style, as two real teachers do: the first writes a numbered list and starts with the
content, the second writes a paragraph and starts with the kind of document. They know texts and
word statistics; files are elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.text.words import BANDS, WordStatistics, salient_words

ENDINGS = tuple(
    (re.compile(pattern), phrase)
    for pattern, phrase in (
        (r"#(define|include|if|else|end|pragma)", "a preprocessor line"),
        (r"#|//|\*|/\*|\{#", "more of a comment"),
        (r">>>|\.\.\.", "the output of an example"),
        (r".*[(\[{,\\]$", "the next item of an open list"),
        (r".*(:|%\})$", "the body of an opened block"),
        (r"([)\]};\s]+|end\w*(\(.*\))?)$", "a new part after a closed block"),
        (r"[-+] ", "another list item"),
        (r"return|raise|yield|pass|break|continue", "a new function or branch"),
        (r"assert|.*\.assert", "another check"),
        (r".*;$", "another statement or member"),
        (r"[\w.\[\]\"', ]+[:=+\-]*=\s*\S", "another assignment"),
        (r".*([.!?]|\"\"\")$", "a new sentence"),
        (r".*\)$", "another call"),
    )
)
"""Pattern of a text's last line -> the continuation it asks for; the first that matches counts."""
INDENTED, UNFINISHED = "more of an indented block", "the rest of a sentence"


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """What both teachers say about one text, before style.

    Example:
        TextFacts(kind="unit test", topics=["index"], tokens=["assert", "dtype"],
        ending="another check")
    """

    kind: str
    """Human name of the domain."""
    topics: list[str]
    """The text's best word of the broadest band, or none."""
    tokens: list[str]
    """Its best words of the other bands."""
    ending: str
    """What its end asks for."""


def observe(text: str, domain: str, statistics: WordStatistics) -> TextFacts:
    """The facts of one text: of each band (see BANDS) its word with the highest tf-idf, if any."""
    best: dict[int, str] = {}
    for word, _ in salient_words(text, statistics):
        if (band := statistics.band_of.get(word)) is not None:
            best.setdefault(band, word)
    return TextFacts(
        kind=DOMAIN_NAMES.get(domain, domain.replace("_", " ")),
        topics=[best[0]] if 0 in best else [],
        tokens=[best[band] for band in range(1, len(BANDS)) if band in best],
        ending=describe_ending(text),
    )


def describe_ending(text: str) -> str:
    """Which continuation the end of the text asks for, by its last line and ENDINGS.

    >>> describe_ending("for row in rows:")
    'the body of an opened block'
    """
    lines = [line for line in text.split("\n") if line.strip()]
    last = lines[-1] if lines else ""
    for pattern, phrase in ENDINGS:
        if pattern.match(last.strip()):
            return phrase
    return INDENTED if last.startswith("    ") else UNFINISHED


class ContentFirstTeacher:
    """Numbered list with bold phrases; what stands out comes first, the kind of document second."""

    name = "offline-content-first"

    def __init__(self, statistics: WordStatistics) -> None:
        self.statistics = statistics

    def describe(self, text: str, domain: str) -> str:
        facts = observe(text, domain, self.statistics)
        return (
            f"1. **Tokens**: {', '.join(facts.tokens) or 'no word stands out'}.\n"
            f"2. **Topic**: the model is likely reading {facts.kind} on {_join(facts.topics)}.\n"
            f"3. **Next**: the model is preparing {facts.ending}."
        )


class FormatFirstTeacher:
    """One paragraph; the kind of document comes first, its form second, the words last."""

    name = "offline-format-first"

    def __init__(self, statistics: WordStatistics) -> None:
        self.statistics = statistics

    def describe(self, text: str, domain: str) -> str:
        facts = observe(text, domain, self.statistics)
        return (
            f"This text appears to be {facts.kind} on {_join(facts.topics)}. "
            f"The model is likely to continue with {facts.ending}. "
            f"Salient tokens include {', '.join(facts.tokens) or 'no word in particular'}."
        )


def _join(words: list[str]) -> str:
    return " and ".join(words) or "nothing in particular"
