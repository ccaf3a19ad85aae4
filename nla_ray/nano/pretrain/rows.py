"""Training rows: chats about documents and raw text, tokenised and packed without padding.

Knows tokens; which texts are read and what is said about them is elsewhere. Protects the rule that
no token of a row sees another sample of the row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_ray.base.prompts import chat_prompt
from nla_ray.nano.pretrain.answers import Answer, compose_answer, list_targets, prompt_target
from nla_ray.nano.pretrain.texts import PretrainTexts
from nla_ray.nano.pretrain.tokenizer import TURN_END
from nla_ray.run.identity import seed_of
from nla_ray.settings.config import PretrainConfig
from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.text.words import salient_words

RAW, DOCUMENT, ANSWER = 0, 1, 2
"""Parts of a row: raw text, the prompt of a chat, the answer of a chat."""
SOFT_WIDTH = 16
"""Candidates of one soft target: 12 words, the bullet, the domain, and two spare."""
CHATS_PER_ROW = 4
SOFT_SLOTS = 32
"""Soft targets in one row: of the generation prompts in the first CHATS_PER_ROW slots, then those
inside word lists while slots are free. A comma without a slot has its next token as the target, as
every other position."""
LOOK_AHEAD = 24
"""Chats among which the longest that fits a row is looked for."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One tokenised chat and its soft targets by position.

    Example, of a prompt of 105 tokens: Chat(prompt_ids=[1, 88, ...], answer_ids=[301, 14, 77, 2,
    201], soft=[(104, {301: 0.3, 77: 0.2, 15: 0.35, 90: 0.15})])
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    soft: list[tuple[int, dict[int, float]]]
    """(position in the chat, id -> probability); the first is at the last token of the prompt."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed training rows; every array has the same first dimension."""

    tokens: np.ndarray
    """[rows, row_tokens], as the three below."""
    positions: np.ndarray
    """Restart at 0 in every segment."""
    segments: np.ndarray
    """Number of the sample in its row."""
    parts: np.ndarray
    """RAW, DOCUMENT or ANSWER."""
    soft_positions: np.ndarray
    """[rows, SOFT_SLOTS], -1 where unused."""
    soft_ids: np.ndarray
    """[rows, SOFT_SLOTS, SOFT_WIDTH], as soft_probabilities."""
    soft_probabilities: np.ndarray

    def batch(self, rows: slice) -> dict[str, torch.Tensor]:
        """Tensors of the chosen rows: int64, and float32 for probabilities."""
        tensors: dict[str, torch.Tensor] = {}
        for name in self.__dataclass_fields__:
            tensor = torch.from_numpy(np.array(getattr(self, name)[rows]))
            tensors[name] = tensor if tensor.is_floating_point() else tensor.long()
        return tensors

    def save(self, folder: Path) -> None:
        """Write every array as `{its name}.npy`."""
        for name in self.__dataclass_fields__:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Rows:
        """The arrays stay on disk, mapped: all processes share one copy."""
        names = cls.__dataclass_fields__
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})


def build_chats(texts: PretrainTexts, tokenizer: Any, config: PretrainConfig) -> list[Chat]:
    """One chat a chunk, tokenised; chats longer than a row are left out."""
    cache: dict[str, list[int]] = {}

    def encode(string: str) -> list[int]:
        if string not in cache:
            cache[string] = tokenizer(string)["input_ids"]
        return cache[string]

    answers: list[Answer] = []
    at_prompt: list[dict[int, float]] = []
    for index, (domain, text) in enumerate(texts.chunks):
        words = salient_words(text, texts.statistics, config.num_words)
        draw = random.Random(seed_of(config.seed, "answer", str(index)))
        answers.append(compose_answer(text, domain, texts.statistics, words, draw))
        at_prompt.append(
            prompt_target(lambda string: encode(string)[0], words, DOMAIN_NAMES[domain])
        )
    prompts = tokenizer([chat_prompt(tokenizer, text) for _, text in texts.chunks])["input_ids"]
    written = tokenizer([f"{answer.text}{TURN_END}\n" for answer in answers])["input_ids"]
    chats = []
    for prompt_ids, answer_ids, answer, target in zip(
        prompts, written, answers, at_prompt, strict=True
    ):
        soft = [(len(prompt_ids) - 1, target)]
        for offset, inside in list_targets(encode, answer.listed):
            soft.append((len(prompt_ids) + offset, inside))
        chats.append(Chat(prompt_ids=prompt_ids, answer_ids=answer_ids, soft=soft))
    return [chat for chat in chats if len(chat) <= config.row_tokens]


def raw_segments(texts: Sequence[str], tokenizer: Any, seed: int) -> Iterator[list[int]]:
    """Endless supply of token lists, one text each, in a new seeded order every round."""
    end = tokenizer.pad_token_id
    encoded = [[*ids, end] for ids in tokenizer(list(texts))["input_ids"]]
    draw = random.Random(seed)
    while True:
        draw.shuffle(encoded)
        yield from encoded


def pack_rows(
    chats: list[Chat], raw: Iterator[list[int]], num_rows: int, config: PretrainConfig
) -> Rows:
    """Rows without padding: chats that fit together, the rest filled with raw text.

    Where raw text has fallen below `raw_share` of all tokens, a row is raw text alone.
    """
    rows = _empty_rows(num_rows, config.row_tokens)
    draw = random.Random(seed_of(config.seed, "pack"))
    waiting: list[Chat] = []
    pending: list[int] = []
    raw_tokens = 0
    for row in range(num_rows):
        start = segment = 0
        if raw_tokens >= config.raw_share * row * config.row_tokens:
            while segment < CHATS_PER_ROW:
                if not waiting:
                    waiting = chats[:]
                    draw.shuffle(waiting)
                index = _find_fitting(waiting, config.row_tokens - start)
                if index is None:
                    break
                start = _place_chat(rows, row, segment, start, waiting.pop(index))
                segment += 1
        while start < config.row_tokens:
            pending = pending or next(raw)
            room = config.row_tokens - start
            piece, pending = pending[:room], pending[room:]
            start = _place_raw(rows, row, segment, start, piece)
            raw_tokens += len(piece)
            segment += 1
    return rows


def _find_fitting(waiting: list[Chat], room: int) -> int | None:
    """Index of the longest chat that fits, among the last ones."""
    best, best_size = None, 0
    for index in range(max(0, len(waiting) - LOOK_AHEAD), len(waiting)):
        size = len(waiting[index])
        if best_size < size <= room:
            best, best_size = index, size
    return best


def _empty_rows(num_rows: int, row_tokens: int) -> Rows:
    plane, slots = (num_rows, row_tokens), (num_rows, SOFT_SLOTS)
    return Rows(
        tokens=np.zeros(plane, np.int32),
        positions=np.zeros(plane, np.int16),
        segments=np.zeros(plane, np.int8),
        parts=np.zeros(plane, np.int8),
        soft_positions=np.full(slots, -1, np.int16),
        soft_ids=np.zeros((*slots, SOFT_WIDTH), np.int32),
        soft_probabilities=np.zeros((*slots, SOFT_WIDTH), np.float32),
    )


def _place_raw(rows: Rows, row: int, segment: int, start: int, piece: list[int]) -> int:
    stop = start + len(piece)
    rows.tokens[row, start:stop] = piece
    rows.positions[row, start:stop] = np.arange(len(piece))
    rows.segments[row, start:stop] = segment
    rows.parts[row, start:stop] = RAW
    return stop


def _place_chat(rows: Rows, row: int, segment: int, start: int, chat: Chat) -> int:
    stop = _place_raw(rows, row, segment, start, chat.prompt_ids + chat.answer_ids)
    answer = start + len(chat.prompt_ids)
    rows.parts[row, start:answer] = DOCUMENT
    rows.parts[row, answer:stop] = ANSWER
    taken = CHATS_PER_ROW + int((rows.soft_positions[row, CHATS_PER_ROW:] >= 0).sum())
    for slot, (offset, target) in zip(
        [segment, *range(taken, SOFT_SLOTS)], chat.soft, strict=False
    ):
        rows.soft_positions[row, slot] = start + offset
        rows.soft_ids[row, slot, : len(target)] = list(target)
        rows.soft_probabilities[row, slot, : len(target)] = list(target.values())
    return stop
