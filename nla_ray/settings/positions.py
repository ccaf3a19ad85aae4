"""What `capture.positions` says: of which tokens of a text activations are kept.

Knows the words of the setting alone: no text, no tokenizer. Protects the rule that what nobody can
capture is refused when it is said, in words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ROLES = ("system", "user", "assistant")
"""Who speaks in a turn of a conversation; a text that is no conversation is one turn of the user's.
"""
_FORMS = (
    "`last`, `random:N`, `all`, `regex:PATTERN`, `substring:STRING`, a role (`user`, `assistant`,"
    " `system`), `last:ROLE`, `mean`, `mean:` before a pattern, a string or a role, or"
    " `generated:N`"
)


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """`capture.positions`, read.

    Example: `mean:regex:frame` is PositionRule(kind="match", pattern=re.compile("frame"),
    is_mean=True), and `last:user` is PositionRule(kind="turn_end", role="user").
    """

    kind: Literal["last", "random", "all", "match", "role", "turn_end", "generated"]
    count: int = 0
    """Tokens drawn by `random`, of the text, and by `generated`, of the base's answer to it."""
    pattern: re.Pattern[str] | None = None
    """Of `match`."""
    role: str | None = None
    """Of `role` and `turn_end`."""
    is_mean: bool = False
    """Whether the tokens give one activation, their mean."""

    @property
    def of_whole_texts(self) -> bool:
        """Whether an activation knows the whole text, and its label is of the whole text."""
        return self.kind == "last" or (self.kind == "all" and self.is_mean)

    @property
    def is_counted(self) -> bool:
        """Whether the length of a text, or of its answer, tells how many activations it has."""
        return self.kind in ("last", "random", "all", "generated") or self.is_mean

    @classmethod
    def of(cls, value: str) -> PositionRule:
        """What a setting says. Raises ValueError for one that says nothing known.

        >>> PositionRule.of("random:3").count, PositionRule.of("mean:user").is_mean
        (3, True)
        """
        head, _, rest = value.partition(":")
        if value in ("last", "all"):
            return cls(kind=value)
        if value == "mean":
            return cls(kind="all", is_mean=True)
        if value in ROLES:
            return cls(kind="role", role=value)
        is_number = rest.isascii() and rest.isdigit() and int(rest) > 0
        if head in ("random", "generated") and is_number:
            return cls(kind=head, count=int(rest))
        if head == "last" and rest in ROLES:
            return cls(kind="turn_end", role=rest)
        if head == "regex" and rest:
            return cls(kind="match", pattern=_compiled(value, rest))
        if head == "substring" and rest:
            return cls(kind="match", pattern=re.compile(re.escape(rest)))
        if head == "mean" and (rest in ROLES or rest.startswith(("regex:", "substring:"))):
            of_tokens = cls.of(rest)
            return cls(
                kind=of_tokens.kind, pattern=of_tokens.pattern, role=of_tokens.role, is_mean=True
            )
        raise ValueError(f"capture.positions: got {value!r}, expected {_FORMS}. Set one of these.")


def _compiled(value: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"capture.positions: got {value!r}, expected a regular expression of Python after"
            f" `regex:` ({error}). Correct it, or look for the characters as they are:"
            " `substring:STRING`."
        ) from None
