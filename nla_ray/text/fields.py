"""What a field of a user's row may hold: a text, or the messages of a conversation.

Knows values alone. Protects the rule that a value that no text of the corpus may be is a reject
with its reason, never a traceback.
"""

from __future__ import annotations

from typing import Any

from nla_ray.base.conversation import Turn, join_turns
from nla_ray.settings.positions import ROLES

BYTE_ORDER_MARK = "\ufeff"
"""What some editors write before a text; no character of it."""
MESSAGES_FIELD = "messages"
"""Field or column that holds a conversation, in the form of Hugging Face's chat templates."""


class BadRow(Exception):
    """Raised within this room; its only argument is a reject's reason."""


def without_marks(text: str) -> str:
    """The text without byte order marks: its hash is then that of the same text elsewhere.

    >>> without_marks("\ufeffA text"), without_marks("A text")
    ('A text', 'A text')
    """
    return text.replace(BYTE_ORDER_MARK, "")


def text_of_field(value: Any, max_chars: int) -> str:
    """A string or UTF-8 bytes as text; raises BadRow for what no text of the corpus may be."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRow("not UTF-8") from None
    if not isinstance(value, str):
        raise BadRow("not a string")
    value = without_marks(value)
    if not value:
        raise BadRow("empty")
    if not value.strip():
        raise BadRow("only white space")
    if len(value) > max_chars:
        raise BadRow("over the length limit")
    if "\0" in value:
        raise BadRow("NUL bytes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("lone surrogates") from None
    return value


def turns_of_field(value: Any, max_chars: int) -> list[Turn]:
    """A list of {role, content} as turns; raises BadRow for what no conversation may be.

    Other fields of a message are not read. `max_chars`: of the plain text of all turns.
    """
    if not isinstance(value, list) or not value:
        raise BadRow("messages: not a list of turns")
    turns = []
    for message in value:
        if not isinstance(message, dict) or message.get("content") is None:
            raise BadRow("messages: a turn without content")
        try:
            role = text_of_field(message.get("role"), max_chars)
            content = text_of_field(message["content"], max_chars)
        except BadRow as bad:
            raise BadRow(f"messages: role or content {bad}") from None
        if role not in ROLES:
            raise BadRow(f"messages: a role that is none of {', '.join(ROLES)}")
        turns.append(Turn(role=role, content=content))
    if len(join_turns(turns)) > max_chars:
        raise BadRow("over the length limit")
    return turns
