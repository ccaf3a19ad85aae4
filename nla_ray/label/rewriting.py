"""A model as cleaner: it rewrites raw labels to bullets, and every rewriting is checked.

A rewriting with a fault is asked for again with the fault, twice at most; where all have one, the
rules of `cleaner` make the bullets. Rewritings lie in the store of answers as teachers' do, and are
paid once. Protects the rule that a cleaner says nothing that the label did not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nla_ray.label.asking import AskedTeacher
from nla_ray.label.cleaner import MAX_BULLETS, clean_label
from nla_ray.label.store import AnswerStore

MAX_REWRITINGS = 3
"""Of one label."""
_MOST_ADDED = 0.2
"""Share of a rewriting's words that the label may lack: other forms of its words."""
_WORD = re.compile(r"[^\W_]{4,}")
_STEM_CHARS = 4
_OF_THE_MODEL = re.compile(r"\bthe (?:language )?model\b", re.IGNORECASE)
_CUT_OFF = (",", ";", ":", "–", "—", "-", "(")
_HEADINGS = {"topic", "topics", "token", "tokens", "next"}


@dataclass(frozen=True, kw_only=True)
class Rewriter:
    """The cleaner's model, and what it answered."""

    cleaner: AskedTeacher
    store: AnswerStore
    max_words: int
    counts: dict[str, int] = field(default_factory=lambda: {"rewritten": 0, "by_rules": 0})
    """Labels that the model made, and those that the rules made in its place."""

    def still_to_ask(self, labels: Iterable[str]) -> Iterator[str]:
        """What the model is to be asked next about each label that has no good rewriting."""
        for raw in labels:
            _, text = self._last(raw)
            if text is not None:
                yield text

    def clean(self, raw: str, max_words: int) -> str:
        """The bullets of a raw label: the model's, or else those of the rules."""
        label, _ = self._last(raw)
        self.counts["by_rules" if label is None else "rewritten"] += 1
        return clean_label(raw, max_words) if label is None else label

    def _last(self, raw: str) -> tuple[str | None, str | None]:
        """The good rewriting of a label, if any; and what is to be asked for one, if anything."""
        text = raw
        for number in range(1, MAX_REWRITINGS + 1):
            answer = self.store.get(self.cleaner.key(text))
            if answer is None:
                return None, text
            label = answer.text.strip()
            fault = answer.fault or fault_of_rewriting(label, raw, self.max_words)
            if not fault:
                return label, None
            text = f"{raw}\n\n[rewriting {number} was refused: {fault}]"
        return None, None


def fault_of_rewriting(label: str, raw: str, max_words: int) -> str:
    """Why a rewriting is not taken for a raw label; empty: it is.

    >>> fault_of_rewriting("Sure: - a lock", "Take a lock.", 70)
    "not 1 to 3 lines that begin with '- '"
    >>> fault_of_rewriting("- a lock\\n- or semaphores", "Take a lock.", 70)
    'words that the label did not say: semaphores'
    """
    lines = label.splitlines()
    if not 1 <= len(lines) <= MAX_BULLETS or not all(re.match(r"- \S", line) for line in lines):
        return f"not 1 to {MAX_BULLETS} lines that begin with '- '"
    if _OF_THE_MODEL.search(label):
        return "it speaks of the model"
    if len(label.split()) - len(lines) > max_words:
        return f"more than {max_words} words"
    if label.endswith(_CUT_OFF):
        return "its end is cut off"
    added = added_words(label, raw)
    if len(added) > _MOST_ADDED * len(_WORD.findall(label)):
        return f"words that the label did not say: {', '.join(added[:8])}"
    return ""


def added_words(label: str, raw: str) -> list[str]:
    """Words of a rewriting that its raw label has in no form: none that begins alike."""
    stems = {word[:_STEM_CHARS] for word in _WORD.findall(raw.lower())}
    words = _WORD.findall(label.lower())
    return [word for word in words if word[:_STEM_CHARS] not in stems and word not in _HEADINGS]
