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
from itertools import zip_longest
from typing import Any

from nla_ray.base.conversation import Turn, content_starts
from nla_ray.base.prompts import RefusedTurns, chat_prompt, conversation_prompt

_SENTINEL = "nla-ray-text"
_CACHED_TOKENIZERS = 8

Spans = list[tuple[int, int]]
"""First character and end of every token, in the string it was made from."""


@functools.lru_cache(_CACHED_TOKENIZERS)
def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> content of the tokens that no text from outside may become."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content for index, token in added if len(token.content.strip()) > 1}


def end_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the model's own list and the tokenizer's."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


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
    """A text, or a conversation, by the chat template.

    Example: the text "A licence" is EncodedChat(ids=[1, 40, 8, 2, 3], spans={1: (0, 1), 2: (1, 9)},
    turns={1: 0, 2: 0})
    """

    ids: list[int]
    spans: dict[int, tuple[int, int]]
    """Position of every token of the text -> first character and end of the text that it holds. A
    conversation's text is that of `join_turns`."""
    turns: dict[int, int]
    """Position of every token of the text -> number of its turn, from 0."""

    @property
    def ends(self) -> dict[int, int]:
        """Position of every token of the text -> how many characters of the text end with it."""
        return {position: end for position, (_, end) in self.spans.items()}


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a chat template puts around and between the contents of turns of certain roles.

    Example: _Frame(parts=("<|im_start|>user\\n", "<|im_end|>\\n<|im_start|>assistant\\n"),
    num_control=3)
    """

    parts: tuple[str, ...]
    """One more than there are turns."""
    num_control: int
    """Control tokens in them."""


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
        self._tokenizer = tokenizer
        self._frames: dict[tuple[str, ...], _Frame] = {}
        try:
            self._frame(("user",))
        except RefusedTurns as error:
            raise ValueError(
                f"chat template of {model}: {error}. Choose a base with an ordinary chat template."
            ) from None

    def encode(self, text: str) -> EncodedChat:
        """The ids of the prompt with the text as a user's turn; it holds no control token."""
        frame = self._frame(("user",))
        prompt = chat_prompt(self._tokenizer, text)
        before, after = frame.parts
        rendered = prompt[len(before) : len(prompt) - len(after)]
        return self._encode_contents(prompt, frame, [rendered], [text], [0])

    def encode_turns(self, turns: Sequence[Turn]) -> EncodedChat:
        """The ids of a conversation, whose contents hold no control token.

        Raises RefusedTurns for what the template does not take, or takes otherwise than it stands
        there.
        """
        frame = self._frame(tuple(turn.role for turn in turns))
        prompt = conversation_prompt(self._tokenizer, turns)
        rendered, at = [], len(frame.parts[0])
        for number, (turn, after) in enumerate(zip(turns, frame.parts[1:], strict=True), start=1):
            # Some templates strip what stands around a content.
            forms = (turn.content, turn.content.strip(), turn.content.lstrip())
            fitting = [form for form in forms if prompt.startswith(form + after, at)]
            if not fitting:
                raise RefusedTurns(
                    f"the chat template alters turn {number}, of {turn.role}, expected its content"
                    " as it is"
                )
            rendered.append(fitting[0])
            at += len(fitting[0]) + len(after)
        contents = [turn.content for turn in turns]
        return self._encode_contents(prompt, frame, rendered, contents, content_starts(turns))

    def _frame(self, roles: tuple[str, ...]) -> _Frame:
        """Raises RefusedTurns unless each content stands in the prompt once, in order."""
        if roles in self._frames:
            return self._frames[roles]
        sentinels = [f"{_SENTINEL}-{number}." for number in range(len(roles))]
        turns = [
            Turn(role=role, content=content) for role, content in zip(roles, sentinels, strict=True)
        ]
        parts, rest = [], conversation_prompt(self._tokenizer, turns)
        for turn in turns:
            count = rest.count(turn.content)
            if count != 1:
                raise RefusedTurns(
                    f"got the text of {turn.role} {count} times in the prompt, expected once"
                )
            part, _, rest = rest.partition(turn.content)
            parts.append(part)
        parts.append(rest)
        num_control = sum(_count_control(self._tokenizer, self._encode(part)[0]) for part in parts)
        self._frames[roles] = _Frame(parts=tuple(parts), num_control=num_control)
        return self._frames[roles]

    def _encode_contents(
        self,
        prompt: str,
        frame: _Frame,
        rendered: Sequence[str],
        contents: Sequence[str],
        starts: Sequence[int],
    ) -> EncodedChat:
        """`rendered`: each content as the prompt has it; `starts`: where it begins in the text."""
        ids, token_spans = self._encode(prompt)
        if _count_control(self._tokenizer, ids) != frame.num_control:
            ids, token_spans = self._encode_apart(frame, rendered)
        spans: dict[int, tuple[int, int]] = {}
        turns: dict[int, int] = {}
        position = at = 0
        for number, content in enumerate(rendered):
            at += len(frame.parts[number])
            end = at + len(content)
            shift = starts[number] + max(0, contents[number].find(content)) - at
            while position < len(ids) and token_spans[position][0] < end:
                left, right = token_spans[position]
                if left < right and right > at:
                    spans[position] = (max(left, at) + shift, min(right, end) + shift)
                    turns[position] = number
                position += 1
            at = end
        return EncodedChat(ids=ids, spans=spans, turns=turns)

    def _encode(self, string: str) -> tuple[list[int], Spans]:
        encoding = self._tokenizer(string, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def _encode_apart(self, frame: _Frame, rendered: Sequence[str]) -> tuple[list[int], Spans]:
        plain = _plain(self._tokenizer)
        ids: list[int] = []
        spans: Spans = []
        at = 0
        for part, content in zip_longest(frame.parts, rendered, fillvalue=""):
            part_ids, part_spans = self._encode(part)
            encoded = plain.encode(content)
            ids += [*part_ids, *encoded.ids]
            spans += [(at + left, at + right) for left, right in part_spans]
            at += len(part)
            spans += [(at + left, at + right) for left, right in encoded.offsets]
            at += len(content)
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


def written_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """What a base wrote with these ids, as characters; special tokens have none."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_ends(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Where each prefix of the ids ends in the string they decode to: 0, then an end for each id.

    A character that its last token has not finished yet is not there.

    >>> token_ends([0, 1], lambda ids: "".join("- frame"[3 * i : 3 * i + 3] for i in ids))
    [0, 3, 6]
    """
    return [len(decode(token_ids[:end]).rstrip("\ufffd")) for end in range(len(token_ids) + 1)]
