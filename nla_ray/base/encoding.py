"""How a text from outside becomes ids: as characters, never as a control token.

A chat log pasted into a text, `<|im_end|>` in a label or in a request: the model reads the
characters that stand there, in capture, training, scoring and over HTTP alike, so that no text
becomes a turn. Control tokens are the tokenizer's added tokens of more than one character, special
or not (`<think>`, `<tool_call>`). A text whose ids hold none is encoded in one piece with what
stands around it. Any other is encoded by itself, by the same tokenizer without those tokens; what
it says is unchanged, which stripping the tokens or leaving the text out would not achieve.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nla_ray.base.prompts import chat_prompt

_SENTINEL = "nla-ray-text"
_CACHED_TOKENIZERS = 8

Spans = list[tuple[int, int]]
"""First character and end of every token, in the string it was made from."""


@functools.lru_cache(_CACHED_TOKENIZERS)
def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> content of the tokens that no text from outside may become."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content for index, token in added if len(token.content.strip()) > 1}


def encode_texts(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    before: str = "",
    after: str = "",
    add_special_tokens: bool = False,
) -> list[list[int]]:
    """The ids of `before + text + after` for each text; only what stands around it is control.

    `add_special_tokens`: what the tokenizer puts around a string, such as its first token.
    """
    if not texts:
        return []
    wholes = [f"{before}{text}{after}" for text in (*texts, "")]
    *encoded, around = tokenizer(wholes, add_special_tokens=add_special_tokens)["input_ids"]
    allowed = _count_control(tokenizer, around)
    for number, text in enumerate(texts):
        if _count_control(tokenizer, encoded[number]) != allowed:
            first = tokenizer(before, add_special_tokens=add_special_tokens)["input_ids"]
            last = tokenizer(after, add_special_tokens=False)["input_ids"]
            encoded[number] = [*first, *_plain(tokenizer).encode(text).ids, *last]
    return encoded


@dataclass(frozen=True, kw_only=True)
class EncodedChat:
    """A text as a user's turn, with the generation prompt appended.

    Example: the text "A licence" is EncodedChat(ids=[1, 40, 8, 2, 3], ends={1: 1, 2: 9})
    """

    ids: list[int]
    ends: dict[int, int]
    """Position of every token of the text -> how many characters of the text end with it."""


class ChatEncoder:
    """Renders a text by the chat template and encodes it; knows which tokens are the text's."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        """Raises ValueError for a slow tokenizer, and for a template that alters the user's turn.

        `model`: the base's name, for the message.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer of {model}: got a slow one, expected one that reports character"
                " offsets. Install its fast version (tokenizer.json)."
            )
        around = chat_prompt(tokenizer, _SENTINEL).split(_SENTINEL)
        if len(around) != 2:
            raise ValueError(
                f"chat template of {model}: got the user's text {len(around) - 1} times in the"
                " prompt, expected once. Choose a base with an ordinary chat template."
            )
        self._tokenizer = tokenizer
        self._before, self._after = around
        self._allowed = sum(_count_control(tokenizer, self._encode(part)[0]) for part in around)

    def encode(self, text: str) -> EncodedChat:
        """The ids of the prompt, in which the text holds no control token."""
        prompt = chat_prompt(self._tokenizer, text)
        start, end = len(self._before), len(prompt) - len(self._after)
        rendered = prompt[start:end]
        ids, spans = self._encode(prompt)
        if _count_control(self._tokenizer, ids) != self._allowed:
            ids, spans = self._encode_apart(rendered)
        stripped = max(0, text.find(rendered))  # some templates strip what stands around a text
        ends = {
            position: min(right, end) - start + stripped
            for position, (left, right) in enumerate(spans)
            if left < right and left < end and right > start
        }
        return EncodedChat(ids=ids, ends=ends)

    def _encode(self, string: str) -> tuple[list[int], Spans]:
        encoding = self._tokenizer(string, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def _encode_apart(self, text: str) -> tuple[list[int], Spans]:
        plain = _plain(self._tokenizer).encode(text)
        parts = (
            (0, self._encode(self._before)),
            (len(self._before), (plain.ids, plain.offsets)),
            (len(self._before) + len(text), self._encode(self._after)),
        )
        ids = [index for _, (part, _) in parts for index in part]
        spans = [
            (shift + left, shift + right)
            for shift, (_, offsets) in parts
            for left, right in offsets
        ]
        return ids, spans


def _count_control(tokenizer: Any, ids: Sequence[int]) -> int:
    control = control_tokens(tokenizer)
    return sum(index in control for index in ids)


@functools.lru_cache(_CACHED_TOKENIZERS)
def _plain(tokenizer: Any) -> Any:
    """The fast tokenizer behind `tokenizer`, without its control tokens.

    Source: the format of tokenizer.json. Merges of ordinary tokens into a control token go too:
    vocabularies of SentencePiece have them. Raises ValueError where a control token is still made.
    """
    from tokenizers import Tokenizer

    control = control_tokens(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] not in control
    ]
    content.update(post_processor=None, truncation=None, padding=None)
    if merges := content["model"].get("merges"):
        made = set(control.values())
        content["model"]["merges"] = [merge for merge in merges if "".join(merge) not in made]
    plain = Tokenizer.from_str(json.dumps(content))
    for index, token in control.items():
        if index in plain.encode(token).ids:
            raise ValueError(
                f"tokenizer of {tokenizer.name_or_path}: got control token {token!r} from its plain"
                " characters, expected ordinary tokens. Choose another base, or remove the token"
                " from your texts."
            )
    return plain


def token_ends(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Where each prefix of the ids ends in the string they decode to: 0, then an end for each id.

    A character that its last token has not finished yet is not there.

    >>> token_ends([0, 1], lambda ids: "".join("- frame"[3 * i : 3 * i + 3] for i in ids))
    [0, 3, 6]
    """
    return [len(decode(token_ids[:end]).rstrip("\ufffd")) for end in range(len(token_ids) + 1)]
