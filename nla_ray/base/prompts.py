"""Every prompt string, and how a description is wrapped in tags and read back.

The verbalizer's instruction stands BEFORE the marker, so that nearly the whole prompt is a prefix
common to all activations and its keys and values are computed once. The opening tag ends the
prompt: a verbalizer writes only `{description}{closing tag}`.

One verbalizer may describe activations of several layers (`base.further_layers`). Its prompt then
tells the layer in words, right BEHIND the marker. What stands before it is the same for all
layers, so that training and engines still share one prefix. A layer's own are how the prompt ends
and the norm to which its activations are rescaled (`LayerEnding`). The prompt of a verbalizer that
knows one layer tells none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nla_ray.base.conversation import Turn
from nla_ray.settings.config import BaseConfig, require

OPENING_TAG = "<description>"
CLOSING_TAG = "</description>"
VERBALIZER_TEMPLATE = "Describe the text behind this activation in two or three bullets: {marker}"
_LAYER_TOLD = " (layer {layer})"
"""Behind the marker, where a verbalizer knows several layers."""
RECONSTRUCTOR_TEMPLATE = "{description}\nActivation: {marker}"
"""Filled raw, without chat template; it ends in the marker, at which the reconstruction is read."""
GENERIC_DESCRIPTION = (
    "- A text with some words and a structure\n- tokens: the, and, of\n- next: it goes on"
)
"""The fixed sentence of the generic control: true of every text, and so worth nothing."""


RAW_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""In place of a chat template, for a base that has none: the text, and a line's end, at which the
activation of the end of the prompt is read."""

_NOW = re.compile(r"strftime_now\(\s*(['\"])(?P<format>[^'\"\\]*)\1\s*\)")
"""A call by which a chat template prints the date of today. Source: transformers' templates."""
_FIXED = re.compile(r"\{# The date is (\S+)\. #\}\n")
"""Begins a template whose date is fixed: a comment, of which Jinja prints nothing."""


def wrap_description(description: str) -> str:
    """The text a verbalizer is trained to write after the opening tag.

    >>> wrap_description(" - a licence ")
    '- a licence</description>'
    """
    return f"{description.strip()}{CLOSING_TAG}"


def parse_description(written: str) -> tuple[str, bool]:
    """The text of what a verbalizer wrote, and whether the closing tag came.

    The text is everything up to the first closing tag, without outer white space; an opening tag
    that was repeated is dropped. Text without a closing tag is kept as it is: a truncated
    description is scored, not dropped.

    >>> parse_description("<description>- a licence</description> and")
    ('- a licence', True)
    """
    body, tag, _ = written.partition(CLOSING_TAG)
    return body.removeprefix(OPENING_TAG).strip(), bool(tag)


def reconstructor_prompt(description: str, marker: str) -> str:
    """The reconstructor's input for a description, from which markers are removed first.

    >>> reconstructor_prompt("- a # licence", "#")
    '- a  licence\\nActivation: #'
    """
    before, after = around_description(marker)
    return f"{before}{unmarked(description, marker)}{after}"


def unmarked(description: str, marker: str) -> str:
    """A description as it stands in the reconstructor's prompt: without markers."""
    return description.replace(marker, "").strip()


def around_description(marker: str) -> tuple[str, str]:
    """What stands before and after the description in the reconstructor's prompt."""
    before, _, after = RECONSTRUCTOR_TEMPLATE.partition("{description}")
    return before, after.format(marker=marker)


class RefusedTurns(ValueError):
    """Turns that a chat template does not take, or does not take as they are."""


def chat_prompt(tokenizer: Any, text: str) -> str:
    """`text` as a user's turn with the generation prompt appended: what a base reads in capture."""
    return conversation_prompt(tokenizer, (Turn(role="user", content=text),))


def conversation_prompt(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """Turns by the chat template, the generation prompt appended unless the assistant spoke last.

    Raises RefusedTurns with the template's own words where it takes no such turns: a system turn,
    or roles in this order.
    """
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [vars(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=turns[-1].role != "assistant",
        )
    except TemplateError as error:
        raise RefusedTurns(f"the chat template says: {error}") from None


def fix_date(template: str, date: str) -> str:
    """A chat template that prints this date, `2026-01-01`, instead of today's.

    A template that prints no date stays as it is. Raises ValueError for one that computes the form
    in which it prints the date.

    >>> print(fix_date("Today is {{ strftime_now('%d %b %Y') }}.", "2026-01-01"))
    {# The date is 2026-01-01. #}
    Today is {{ '01 Jan 2026' }}.
    """
    day = datetime.fromisoformat(date)
    fixed, count = _NOW.subn(lambda call: repr(day.strftime(call["format"])), template)
    if "strftime_now(" in fixed:
        raise ValueError(
            "chat template: got a call of strftime_now without a plain format, expected one such as"
            " strftime_now('%d %b %Y'). Write the date into the template of a local copy of the"
            " base."
        )
    return f"{{# The date is {date}. #}}\n{fixed}" if count else template


def fixed_date(template: str) -> str | None:
    """The date that `fix_date` has put into a template; None where it prints none."""
    found = _FIXED.match(template)
    return found[1] if found else None


def opened_template(chat_template: str) -> str:
    """A chat template that opens the description itself, after its generation prompt.

    With it a tool that renders the user's turn alone asks as `verbalizer_prompt` does.
    """
    opening = f"{{% if add_generation_prompt %}}{OPENING_TAG}{{% endif %}}"
    # Jinja drops one end of line at a template's end, and no other.
    return f"{chat_template.removesuffix(chr(10))}{opening}"


def verbalizer_prompt(tokenizer: Any, marker: str, layer: int | None = None) -> str:
    """The verbalizer's prompt as text: instruction, marker, generation prompt, opening tag.

    `layer`: what it tells; None: it tells none.
    """
    told = "" if layer is None else _LAYER_TOLD.format(layer=layer)
    instruction = VERBALIZER_TEMPLATE.format(marker=marker) + told
    return chat_prompt(tokenizer, instruction) + OPENING_TAG


_WORD_BEGIN = "\u2581"
"""The piece that vocabularies of SentencePiece put before a string."""


def marker_token(tokenizer: Any, marker: str) -> int:
    """The marker's id. Raises ValueError unless the tokenizer makes exactly one token of it.

    The piece that SentencePiece puts before a character that stands alone does not count.
    """
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) == 2 and tokenizer.convert_ids_to_tokens(ids[0]) == _WORD_BEGIN:
        return ids[1]
    if len(ids) != 1:
        raise ValueError(
            f"marker {marker!r} is not one token: got {ids}, expected exactly one id. "
            "Choose another --base.marker for this tokenizer."
        )
    return ids[0]


def find_marker(tokenizer: Any) -> str:
    """A marker for a tokenizer: its rarest character that is one token in both prompts.

    Rare means of the highest id, since byte-level vocabularies are ordered by frequency. Raises
    ValueError when no character will do.
    """
    for token in range(len(tokenizer) - 1, -1, -1):
        marker = tokenizer.decode([token])
        if len(marker) != 1 or marker.isascii() or marker == "\ufffd":
            continue
        try:
            if marker_token(tokenizer, marker) != token:
                continue
            build_injection_prompt(tokenizer, marker)
        except ValueError:
            continue
        if tokenizer.encode(reconstructor_prompt("- a description.", marker))[-1] == token:
            return marker
    raise ValueError(
        f"marker: got no character of {len(tokenizer)} tokens that is one token in both prompts,"
        " expected at least one. Add one to the tokenizer, or choose another base."
    )


@dataclass(frozen=True, kw_only=True)
class InjectionPrompt:
    """The verbalizer's prompt as ids, cut at the marker.

    Row 5 of a bank becomes a virtual id above the vocabulary:

    >>> prompt = InjectionPrompt(prefix_ids=(1, 40, 8), marker_id=7, suffix_ids=(2, 3, 1))
    >>> prompt.encode(5, vocab_size=100), prompt.neighbours, len(prompt)
    ([1, 40, 8, 105, 2, 3, 1], (8, 2), 7)

    Where two vectors stand for an activation, the bank has two rows for it:

    >>> dataclasses.replace(prompt, num_vectors=2).encode(5, vocab_size=100)
    [1, 40, 8, 110, 111, 2, 3, 1]
    """

    prefix_ids: tuple[int, ...]
    """Before the marker: the same for every activation."""
    marker_id: int
    suffix_ids: tuple[int, ...]
    """After the marker: end of turn, generation prompt, opening tag."""
    num_vectors: int = 1
    """Vectors of one activation, which stand in the marker's place one behind the other."""

    @property
    def neighbours(self) -> tuple[int, int]:
        """Ids left and right of the marker, as manifests record them.

        They differ when a tokenizer or its template has changed.
        """
        return self.prefix_ids[-1], self.suffix_ids[0]

    def encode(self, row: int, vocab_size: int) -> list[int]:
        """The prompt with the marker replaced by the virtual ids of activation `row`."""
        first = vocab_size + row * self.num_vectors
        return [*self.prefix_ids, *range(first, first + self.num_vectors), *self.suffix_ids]

    @property
    def marked_ids(self) -> list[int]:
        """The prompt with the marker where vectors stand."""
        return [*self.prefix_ids, *[self.marker_id] * self.num_vectors, *self.suffix_ids]

    def __len__(self) -> int:
        return len(self.prefix_ids) + self.num_vectors + len(self.suffix_ids)


@dataclass(frozen=True, kw_only=True)
class LayerEnding:
    """What of a verbalizer's prompt is a layer's own; all before the marker is common to them.

    Example, of layer 2: LayerEnding(suffix_ids=(318, 21, 13, 2, 3, 1), injection_norm=35.0)
    """

    suffix_ids: tuple[int, ...]
    """After the marker: the layer, end of turn, generation prompt, opening tag."""
    injection_norm: float
    """L2 norm to which the layer's activations are rescaled."""

    def of(self, prompt: InjectionPrompt) -> InjectionPrompt:
        """The prompt that ends so."""
        return dataclasses.replace(prompt, suffix_ids=self.suffix_ids)


def layer_endings(tokenizer: Any, base: BaseConfig) -> dict[int, LayerEnding]:
    """How the prompt of each of `base.further_layers` ends.

    Raises ValueError where the prompts of two layers differ before the marker.
    """
    common, endings = injection_prompt(tokenizer, base).prefix_ids, {}
    for layer in base.further_layers:
        prompt = injection_prompt(tokenizer, base, layer=layer)
        require(
            prompt.prefix_ids == common,
            f"verbalizer prompt of layer {layer}",
            prompt.prefix_ids,
            f"{common} before the marker, as at layer {base.layer}",
            "The tokenizer joins what stands on both sides of it: choose another --base.marker.",
        )
        endings[layer] = LayerEnding(
            suffix_ids=prompt.suffix_ids, injection_norm=base.norm_of(layer)
        )
    return endings


def injection_prompt(
    tokenizer: Any,
    base: BaseConfig,
    neighbours: Sequence[int] | None = None,
    layer: int | None = None,
) -> InjectionPrompt:
    """The prompt of a configured base, as `build_injection_prompt` makes it.

    `layer`: whose activations it is for, None: the base's. It tells that where there are several.
    """
    told = (base.layer if layer is None else layer) if base.further_layers else None
    prompt = build_injection_prompt(tokenizer, base.marker, neighbours, told)
    return dataclasses.replace(prompt, num_vectors=len(base.injected))


def build_injection_prompt(
    tokenizer: Any, marker: str, neighbours: Sequence[int] | None = None, layer: int | None = None
) -> InjectionPrompt:
    """Tokenise the verbalizer's prompt, as `cut_at_marker` does. `layer`: that it tells."""
    text = verbalizer_prompt(tokenizer, marker, layer)
    return cut_at_marker(tokenizer, text, marker, neighbours)


def cut_at_marker(
    tokenizer: Any, text: str, marker: str, neighbours: Sequence[int] | None = None
) -> InjectionPrompt:
    """Tokenise a rendered prompt and check the marker, which one vector replaces.

    Raises ValueError when the marker does not occur exactly once, or when its neighbours differ
    from the recorded ones.
    """
    marker_id = marker_token(tokenizer, marker)
    ids = tokenizer.encode(text, add_special_tokens=False)
    count = ids.count(marker_id)
    if count != 1:
        raise ValueError(
            f"verbalizer prompt: got {count} markers {marker!r} in {len(ids)} tokens, expected"
            " exactly 1. The chat template changes the user's turn; choose another --base.marker."
        )
    position = ids.index(marker_id)
    prompt = InjectionPrompt(
        prefix_ids=tuple(ids[:position]), marker_id=marker_id, suffix_ids=tuple(ids[position + 1 :])
    )
    if neighbours is not None and tuple(neighbours) != prompt.neighbours:
        raise ValueError(
            f"neighbours of the marker: got {prompt.neighbours}, expected {tuple(neighbours)} as"
            " recorded in the manifest. The tokenizer or template differs from the one it was"
            " trained with; load that one."
        )
    return prompt
