"""A conversation: turns of a system, a user and an assistant, and the plain text that they make.

Knows strings alone. Protects the rule that a conversation and its plain text go together: what a
character of the text belongs to is told by where contents begin in it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says before another one speaks.

    Example: Turn(role="user", content="Where is my order?")
    """

    role: str
    """One of `settings.positions.ROLES`."""
    content: str


def as_conversation(text: str, messages: str | None) -> tuple[Turn, ...]:
    """The turns of a text of the corpus: those of `messages`, JSON, or else the user's one."""
    if messages is None:
        return (Turn(role="user", content=text),)
    return tuple(
        Turn(role=message["role"], content=message["content"]) for message in json.loads(messages)
    )


def as_messages(turns: Sequence[Turn]) -> str:
    """Turns as JSON in the form of chat templates: what `as_conversation` reads."""
    return json.dumps([vars(turn) for turn in turns], ensure_ascii=False)


def join_turns(turns: Sequence[Turn]) -> str:
    r"""The plain text of a conversation: each turn after its role, an empty line between turns.

    >>> join_turns([Turn(role="user", content="Hello"), Turn(role="assistant", content="Hi!")])
    'user: Hello\n\nassistant: Hi!'
    """
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def content_starts(turns: Sequence[Turn]) -> list[int]:
    """Where the content of each turn begins in the text that `join_turns` makes.

    >>> content_starts([Turn(role="user", content="Hello"), Turn(role="assistant", content="Hi!")])
    [6, 24]
    """
    heads = [len(turn.role) + len(": ") for turn in turns]
    bodies = [len(turn.content) + len("\n\n") for turn in turns]
    before = itertools.accumulate(
        (head + body for head, body in zip(heads, bodies, strict=True)), initial=0
    )
    return [start + head for start, head in zip(before, heads, strict=False)]
