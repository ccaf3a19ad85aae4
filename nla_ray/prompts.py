"""Every prompt string, and how a description is wrapped in tags and read back.

The verbalizer's instruction stands BEFORE the marker, so that nearly the whole prompt is a prefix
common to all activations and its keys and values are computed once. The opening tag ends the
prompt: a verbalizer writes only `{description}{closing tag}`.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENING_TAG = "<description>"
CLOSING_TAG = "</description>"
VERBALIZER_TEMPLATE = "Describe the text behind this activation in two or three bullets: {marker}"
RECONSTRUCTOR_TEMPLATE = "{description}\nActivation: {marker}"
"""Filled raw, without chat template; it ends in the marker, at which the reconstruction is read."""
GENERIC_DESCRIPTION = (
    "- A text with some words and a structure\n- tokens: the, and, of\n- next: it goes on"
)
"""The fixed sentence of the generic control: true of every text, and so worth nothing."""


@dataclass(frozen=True)
class ParsedDescription:
    """What a verbalizer wrote: `text` without tags and outer white space; `closed` False when the
    tag never came."""

    text: str
    closed: bool


def wrap_description(description: str) -> str:
    """The text a verbalizer is trained to write after the opening tag."""
    return f"{description.strip()}{CLOSING_TAG}"


def parse_description(written: str) -> ParsedDescription:
    """Everything up to the first closing tag; an opening tag that was repeated is dropped.

    Text without a closing tag is kept as it is: a truncated description is scored, not dropped.
    """
    body, tag, _ = written.partition(CLOSING_TAG)
    return ParsedDescription(text=body.removeprefix(OPENING_TAG).strip(), closed=bool(tag))


def reconstructor_prompt(description: str, marker: str) -> str:
    """The reconstructor's input for one description. A marker inside the description is removed
    first."""
    return RECONSTRUCTOR_TEMPLATE.format(
        description=description.replace(marker, "").strip(), marker=marker
    )


def chat_prompt(tokenizer, text: str) -> str:
    """`text` as one user turn with the generation prompt appended: what the base model reads when
    it is captured."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def verbalizer_prompt(tokenizer, marker: str) -> str:
    """The verbalizer's prompt as text: instruction, marker, generation prompt, opening tag."""
    return chat_prompt(tokenizer, VERBALIZER_TEMPLATE.format(marker=marker)) + OPENING_TAG
