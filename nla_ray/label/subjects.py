"""What a label is about: a text, or a text up to the token at a position.

An activation inside a text knows nothing of what comes after it: attention is causal. So its label
is of the text up to it, and a label of the whole text belongs to the prompt's last token alone.
Protects the rule that a label meets the activations of its own subject and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nla_ray.activation.positions import Skipped, TextEncoder


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What one label is about.

    Example: Subject(text={"text_id": "a#0", "text": "A licence.", ...}, read="A lic", position=31,
    n_raw_tokens=2)
    """

    text: Mapping[str, Any]
    """The row of CHUNK_SCHEMA or CONVERSATION_SCHEMA."""
    read: str
    """What a teacher sees of it: the text up to the position, that token included; inside the
    base's answer the text, and the answer up to there."""
    position: int | None = None
    """0-based index of the token in the chat-formatted prompt, and in the base's answer after it;
    None: the label is of the text."""
    n_raw_tokens: int | None = None
    """Tokens of the text up to the position, that token included; None as there."""


def subject_id(text_id: str, position: int | None) -> str:
    """The name by which labels meet activations.

    >>> subject_id("a#0", None), subject_id("a#0", 31)
    ('a#0', 'a#0:31')
    """
    return text_id if position is None else f"{text_id}:{position}"


def subjects_of(text: Mapping[str, Any], encoder: TextEncoder | None) -> Iterator[Subject]:
    """The text itself; with an encoder, the text up to each of its positions.

    `text`: a row of CHUNK_SCHEMA or CONVERSATION_SCHEMA, with `answer`, ids, where positions are in
    the base's answers. A text that cannot be captured has no position.
    """
    if encoder is None:
        yield Subject(text=text, read=text["text"])
        return
    try:
        encoded = encoder.encode(
            text["text_id"], text["text"], text.get("messages"), text.get("answer", ())
        )
    except Skipped:
        return
    found = zip(encoded.positions, encoded.read, encoded.n_raw_tokens, strict=True)
    for position, read, n_raw_tokens in found:
        yield Subject(text=text, read=read, position=position, n_raw_tokens=n_raw_tokens)
