"""Two deterministic teachers that need neither a network nor a key, and are named as offline.

They describe a text by three facts that can be checked against it: what it is about (the domain and
its most telling words), which words stand out, and which form of continuation its end asks for. The
two differ in style, as two real teachers do: one writes a numbered list and starts with the
content, the other one paragraph and starts with the kind of document. They know texts and word
statistics; files are elsewhere.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from nla_ray.corpus.embedded import DOMAIN_NAMES

MIN_DOCUMENT_FREQUENCY = 15
"""A rarer word is one that a small model cannot learn to name."""
MAX_DOCUMENT_SHARE = 0.25
"""A word in more than a quarter of all documents says nothing about one of them."""
BANDS = ((0.74, 1.0), (0.40, 0.55), (0.0, 0.22))
"""Where a label's words come from: shares of all tellable words in order of their document
frequency, counted with it.

One word of each band, the broad one as topic, the others as tokens. A writer that decides one word
after the other must not name one twice. It cannot if every place of a list has a vocabulary of its
own; the gaps keep a word near a border from fitting two places. Measured after supervised training
of the embedded default on its validation texts: with the seven best words of a text, in the order
of the alphabet or of frequency, 99% of the descriptions repeat a word; with one of each of five
adjacent bands 48%, of three 16%, of these three 6%.
"""

STOP_WORDS = frozenset(
    """the and for that this with from are was were will would can could should may might must not but its has have
    had been being than then them they their there these those which what when where who whom whose how why all any
    some such only own same other each few more most very too also into onto over under out off about above below
    after before between through during until while because both either neither nor you your yours our ours his her
    him she one two use used using does did done let get got just here see per via etc self cls none true false
    def return import class elif else pass lambda yield try except finally raise isinstance len str int bool""".split()
)

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

_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True, kw_only=True)
class WordStatistics:
    """Document frequencies over the train texts, all that a teacher knows beside the text itself.

    Example:
        WordStatistics(num_documents=3, document_frequency={"frame": 2, "index": 3})
    """

    num_documents: int
    document_frequency: dict[str, int]

    @classmethod
    def fit(cls, texts: Iterable[str]) -> "WordStatistics":
        """Count in how many of the texts each word occurs. The caller passes train texts only."""
        counts: Counter[str] = Counter()
        num_documents = 0
        for text in texts:
            num_documents += 1
            counts.update(set(split_words(text)))
        return cls(num_documents=num_documents, document_frequency=dict(counts))

    def inverse_frequency(self, word: str) -> float:
        """log(N / df), or 0 for a word that is too rare or too common to be told."""
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
            bands.update(
                (word, index) for index, (low, high) in enumerate(BANDS) if low <= share < high
            )
        return bands


def split_words(text: str) -> list[str]:
    """Lower-case word pieces in order: identifiers are cut at `_`, digits and camelCase; 3 letters
    at least.

    Example: "readFrameIndex(df_test, x1)" -> ["read", "frame", "index", "test"]
    """
    pieces = (piece.lower() for piece in _PIECE.findall(text))
    return [piece for piece in pieces if 3 <= len(piece) <= 18 and piece not in STOP_WORDS]


def salient_words(
    text: str, statistics: WordStatistics, limit: int | None = None
) -> list[tuple[str, float]]:
    """The words of the text with the highest tf-idf (all, or `limit` of them), best first, each
    once, with their scores.

    tf-idf = (1 + log tf) * log(N / df). Ties go to the word that comes first in the alphabet. A
    plural beside its singular is dropped, so that a short list does not say one thing twice.
    """
    counts = Counter(split_words(text))
    scored = [
        (word, (1.0 + math.log(count)) * statistics.inverse_frequency(word))
        for word, count in counts.items()
    ]
    ranked = sorted(
        (pair for pair in scored if pair[1] > 0.0), key=lambda pair: (-pair[1], pair[0])
    )
    chosen: dict[str, float] = {}
    for word, score in ranked:
        if word + "s" not in chosen and (not word.endswith("s") or word[:-1] not in chosen):
            chosen[word] = score
        if len(chosen) == limit:
            break
    return list(chosen.items())


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What both teachers say about one text, before style.

    Example:
        Facts(kind="unit test", topics=["index"], tokens=["assert", "dtype"], ending="another
        check")
    """

    kind: str
    topics: list[str]
    tokens: list[str]
    ending: str


def observe(text: str, domain: str, statistics: WordStatistics) -> Facts:
    """The facts of one text: of each band (see BANDS) the word with the highest tf-idf, if the text
    has one."""
    best: dict[int, str] = {}
    for word, _ in salient_words(text, statistics):
        if (band := statistics.band_of.get(word)) is not None:
            best.setdefault(band, word)
    return Facts(
        kind=DOMAIN_NAMES.get(domain, domain.replace("_", " ")),
        topics=[best[0]] if 0 in best else [],
        tokens=[best[band] for band in range(1, len(BANDS)) if band in best],
        ending=describe_ending(text),
    )


def describe_ending(text: str) -> str:
    """Which continuation the end of the text asks for: the first phrase of ENDINGS whose pattern
    its last line begins with."""
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
