"""From a text to token ids and the positions whose activations are wanted.

And texts in batches of like length. It knows neither models nor run directories. Protects the rule
that an activation goes with the text up to its position: attention is causal, so it knows no more.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from nla_ray.base.encoding import ChatEncoder
from nla_ray.run.identity import seed_of
from nla_ray.settings.config import BaseConfig, CaptureConfig

MAX_PADDING = 0.05
"""Largest share of padding in one forward pass."""


class Skipped(ValueError):
    """A text that has no activation.

    The message starts with the reason: `no_tokens`, `too_long` or `non_finite`.
    """

    @property
    def reason(self) -> str:
        """One word."""
        return str(self).partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A chat-formatted text and the positions whose activations are wanted.

    Example: EncodedText(ids=[1, 40, 8, 2, 3], positions=[1], ends=[5], n_raw_tokens=[1]) of the
    text "quick test", read up to its first token.
    """

    ids: list[int]
    positions: list[int]
    """Ascending, 0-based."""
    ends: list[int] = field(default_factory=list)
    """For each position, how many characters of the text stand up to it, its token included."""
    n_raw_tokens: list[int] = field(default_factory=list)
    """The same in tokens of the text: those of the template do not count."""


class TextEncoder:
    """Formats a text as a user turn with the generation prompt appended; picks positions in it."""

    def __init__(self, tokenizer, base: BaseConfig, capture: CaptureConfig) -> None:
        self._chat, self._max_tokens = ChatEncoder(tokenizer, base.model), base.max_tokens
        self._random_count = (
            int(capture.positions[7:]) if capture.positions.startswith("random:") else None
        )

    def encode(self, text_id: str, text: str) -> EncodedText:
        """The prompt's ids and the wanted positions in it.

        Raises Skipped for a text without tokens or with more than base.max_tokens, template
        included.
        """
        chat = self._chat.encode(text)
        ids, inside = chat.ids, list(chat.ends)
        if not inside:
            raise Skipped("no_tokens: the text became no token, expected at least one")
        if len(ids) > self._max_tokens:
            raise Skipped(
                f"too_long: the prompt has {len(ids)} tokens, expected at most {self._max_tokens} "
                "(--base.max-tokens)"
            )
        if self._random_count is None:
            return EncodedText(
                ids=ids, positions=[len(ids) - 1], ends=[len(text)], n_raw_tokens=[len(inside)]
            )
        drawn = random.Random(seed_of(0, "positions", text_id)).sample(
            inside, min(self._random_count, len(inside))
        )
        positions = sorted(drawn)
        return EncodedText(
            ids=ids,
            positions=positions,
            ends=[chat.ends[position] for position in positions],
            n_raw_tokens=[inside.index(position) + 1 for position in positions],
        )


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
