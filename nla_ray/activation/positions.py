"""From a text to token ids and the positions whose activations are wanted.

And texts in batches of like length. It knows neither models nor run directories. Protects the rule
that an activation goes with the text up to its position: attention is causal, so it knows no more.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from nla_ray.base.conversation import Turn, as_conversation, content_starts, join_turns
from nla_ray.base.encoding import ChatEncoder, EncodedChat, control_tokens, token_ends, written_text
from nla_ray.base.prompts import RefusedTurns
from nla_ray.run.identity import seed_of
from nla_ray.settings.config import BaseConfig, CaptureConfig
from nla_ray.settings.positions import PositionRule

MAX_PADDING = 0.05
"""Largest share of padding in one forward pass."""


MEAN_POSITION = -1
"""In place of a position: the activation is the mean over tokens, and stands at none of them."""


class Skipped(ValueError):
    """A text that has no activation.

    The message starts with the reason: `no_tokens`, `too_long`, `no_match`, `no_answer`,
    `answered`, `refused_by_template` or `non_finite`.
    """

    @property
    def reason(self) -> str:
        """One word."""
        return str(self).partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A chat-formatted text and the positions whose activations are wanted.

    Example: EncodedText(ids=[1, 40, 8, 2, 3], positions=[1], ends=[5], n_raw_tokens=[1]) of the
    text "quick test", read up to its first token; its mean is EncodedText(ids=[1, 40, 8, 2, 3],
    positions=[MEAN_POSITION], averaged=[1, 2], ends=[10], n_raw_tokens=[2]). `text` is said too.
    """

    ids: list[int]
    positions: list[int]
    """Ascending, 0-based; MEAN_POSITION alone, or behind the others."""
    averaged: list[int] = field(default_factory=list)
    """Ascending, 0-based: the positions whose mean is wanted."""
    ends: list[int] = field(default_factory=list)
    """For each of `positions`, how many characters of the text stand up to it, its token included;
    for a mean, up to the last token of it."""
    n_raw_tokens: list[int] = field(default_factory=list)
    """The same in tokens of the text: those of the template do not count."""
    text: str = ""
    """What `ends` count in: the text of the corpus or, where the base has answered, the
    conversation that ends with its answer."""

    @property
    def read(self) -> list[str]:
        """What the model has read of the text at each of `positions`."""
        return [self.text[:end] for end in self.ends]

    @property
    def read_positions(self) -> list[int]:
        """Where the residual stream is read: at positions, then where a mean is of."""
        return [*self.own_positions, *self.averaged]

    @property
    def own_positions(self) -> list[int]:
        """`positions` without that of a mean."""
        return [position for position in self.positions if position != MEAN_POSITION]


class TextEncoder:
    """Formats a text, or a conversation, by the chat template; picks positions in it."""

    def __init__(self, tokenizer, base: BaseConfig, capture: CaptureConfig) -> None:
        self._chat, self._max_tokens = ChatEncoder(tokenizer, base.model), base.max_tokens
        self._tokenizer, self._answer_tokens = tokenizer, capture.answer_tokens
        self._rule, self._said = PositionRule.of(capture.positions), capture.positions
        self._text_mean = capture.text_mean

    def prompt(self, text: str, messages: str | None = None) -> tuple[list[int], int]:
        """The ids that the base is to answer, and how many tokens its answer may have.

        Raises Skipped as `encode` does.
        """
        ids = self._prompt(text, messages).ids
        return ids, min(self._answer_tokens, self._max_tokens - len(ids))

    def encode(
        self, text_id: str, text: str, messages: str | None = None, answer: Sequence[int] = ()
    ) -> EncodedText:
        """The prompt's ids and the wanted positions in it; where the base has answered, in both.

        `messages`: of a conversation, as the corpus holds it; `text` is its plain text then.
        `answer`: ids of what the base answers, where positions are in it. Raises Skipped for a text
        without tokens or with more than base.max_tokens, template included; for one in which no
        token is wanted, and for turns that the template does not take.
        """
        chat, turns = self._prompt(text, messages), as_conversation(text, messages)
        ids, inside = chat.ids, list(chat.spans)
        if self._rule.kind == "generated":
            return self._inside_answer(text_id, chat, turns, answer)
        if self._rule.kind == "last":
            also = [MEAN_POSITION] if self._text_mean else []
            return EncodedText(
                ids=ids,
                positions=[len(ids) - 1, *also],
                averaged=inside if self._text_mean else [],
                ends=[len(text)] * (1 + len(also)),
                n_raw_tokens=[len(inside)] * (1 + len(also)),
                text=text,
            )
        starts = [0] if messages is None else content_starts(turns)
        chosen = self._chosen(text_id, chat, turns, starts)
        if not chosen:
            raise Skipped(f"no_match: no token of the text is one of {self._said}")
        counts = {position: number for number, position in enumerate(inside, start=1)}
        last_read = chosen[-1:] if self._rule.is_mean else chosen
        return EncodedText(
            ids=ids,
            positions=[MEAN_POSITION] if self._rule.is_mean else chosen,
            averaged=chosen if self._rule.is_mean else [],
            ends=[
                len(text) if self._rule.of_whole_texts else chat.ends[position]
                for position in last_read
            ],
            n_raw_tokens=[counts[position] for position in last_read],
            text=text,
        )

    def _prompt(self, text: str, messages: str | None) -> EncodedChat:
        """What the base reads of a text. Raises Skipped."""
        turns, is_answered = as_conversation(text, messages), self._rule.kind == "generated"
        if is_answered and turns[-1].role == "assistant":
            raise Skipped(
                "answered: the last turn is the assistant's, expected one that the base can answer"
            )
        try:
            chat = self._chat.encode(text) if messages is None else self._chat.encode_turns(turns)
        except RefusedTurns as error:
            raise Skipped(f"refused_by_template: {error}") from None
        if not chat.spans:
            raise Skipped("no_tokens: the text became no token, expected at least one")
        most = self._max_tokens - is_answered  # an answer has a token at least
        if len(chat.ids) > most:
            raise Skipped(
                f"too_long: the prompt has {len(chat.ids)} tokens, expected at most {most} "
                "(--base.max-tokens)"
            )
        return chat

    def _inside_answer(
        self, text_id: str, chat: EncodedChat, turns: Sequence[Turn], answer: Sequence[int]
    ) -> EncodedText:
        """A prompt with the base's answer, and the wanted positions in the answer."""
        control, vocabulary = control_tokens(self._tokenizer), len(self._tokenizer)
        inside = [
            number
            for number, token in enumerate(answer)
            if token < vocabulary and token not in control
        ]
        if not inside:
            raise Skipped("no_answer: the base's answer has no token, expected at least one")
        draw = random.Random(seed_of(0, "positions", text_id))
        drawn = sorted(draw.sample(range(len(inside)), min(self._rule.count, len(inside))))
        said = written_text(self._tokenizer, answer)
        text = join_turns([*turns, Turn(role="assistant", content=said)])
        ends = token_ends(answer, partial(written_text, self._tokenizer))
        return EncodedText(
            ids=[*chat.ids, *answer],
            positions=[len(chat.ids) + inside[number] for number in drawn],
            ends=[len(text) - len(said) + ends[inside[number] + 1] for number in drawn],
            n_raw_tokens=[len(chat.spans) + number + 1 for number in drawn],
            text=text,
        )

    def _chosen(
        self, text_id: str, chat: EncodedChat, turns: Sequence[Turn], starts: Sequence[int]
    ) -> list[int]:
        """The wanted tokens of the text, ascending. `starts`: where contents begin in the text."""
        rule, inside = self._rule, list(chat.spans)
        if rule.kind == "all":
            return inside
        if rule.kind == "random":
            draw = random.Random(seed_of(0, "positions", text_id))
            return sorted(draw.sample(inside, min(rule.count, len(inside))))
        if rule.pattern is not None:
            return sorted(_matched(chat, turns, starts, rule.pattern, last_only=not rule.is_mean))
        of_role = [position for position in inside if turns[chat.turns[position]].role == rule.role]
        if rule.kind == "role":
            return of_role
        return sorted({chat.turns[position]: position for position in of_role}.values())


def _matched(
    chat: EncodedChat,
    turns: Sequence[Turn],
    starts: Sequence[int],
    pattern: re.Pattern[str],
    *,
    last_only: bool,
) -> set[int]:
    """The tokens that hold characters of matches; `last_only`: of each the one that it ends in.

    A match lies within one turn. An empty one holds no character.
    """
    by_turn: dict[int, list[int]] = {}
    for position, number in chat.turns.items():
        by_turn.setdefault(number, []).append(position)
    found: set[int] = set()
    for number, positions in by_turn.items():
        lefts, rights = zip(*(chat.spans[position] for position in positions), strict=True)
        for match in pattern.finditer(turns[number].content):
            start, end = starts[number] + match.start(), starts[number] + match.end()
            if start == end:
                continue
            if not last_only:
                first, after = bisect_right(rights, start), bisect_left(lefts, end)
                found.update(positions[first:after])
                continue
            # Of a character of several tokens the last one; of a space that offsets leave out, the
            # token that begins with it.
            last = max(bisect_left(rights, end), bisect_left(lefts, end) - 1)
            if last < len(positions) and lefts[0] < end:
                found.add(positions[last])
    return found


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of texts in batches of like length.

    Each batch has at most `batch_tokens` padded tokens and MAX_PADDING padding; a text longer than
    `batch_tokens` is a batch by itself.

    >>> plan_batches([10, 5, 10, 5], batch_tokens=20)
    [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[index]
        rows = len(batches[-1]) + 1 if batches else 1
        fits = (
            rows * length <= batch_tokens and tokens + length >= (1 - MAX_PADDING) * rows * length
        )
        if not batches or not fits:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += length
    return batches


def padded_tokens(lengths: Sequence[int], batch_tokens: int) -> int:
    """Tokens that the forward passes of `plan_batches` compute, padding included."""
    return sum(
        len(batch) * max(lengths[i] for i in batch) for batch in plan_batches(lengths, batch_tokens)
    )
