"""What the small base model learns from: train documents as raw text and as chats about them,
packed into rows.

In a chat the user gives a piece of a document and the assistant says what it holds: a list of its
salient words, a label in either offline style, or the kind of document. The target at the
generation prompt is the exact expectation over those answers, and before each further word of a
list it is the words not listed yet, so that neither has sampling noise and a word that was listed
is never a target again. Only train documents are read, and no piece of them that a held-out text of
the corpus nearly repeats; held-out documents that nearly repeat a whole one are listed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nla_ray.base.prompts import chat_prompt
from nla_ray.label.cleaner import clean_label
from nla_ray.nano.embedded_corpus import embedded_chunks
from nla_ray.nano.installed_texts import list_sources, read_source
from nla_ray.nano.offline_teachers import ContentFirstTeacher, FormatFirstTeacher, observe
from nla_ray.run.identity import seed_of, split_of
from nla_ray.settings.config import CorpusConfig, PretrainConfig
from nla_ray.text.choosing import HEAD_CHARS, seeded_order
from nla_ray.text.chunks import Chunk
from nla_ray.text.cutting import cut_chunks, is_informative
from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.text.duplicates import first_of_clusters, has_twin, minhash_signatures
from nla_ray.text.words import WordStatistics, salient_words

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
"""ChatML without a default system prompt."""
RAW, DOCUMENT, ANSWER = 0, 1, 2
ANSWER_SHARES = {"words": 0.45, "description": 0.35, "domain": 0.20}
"""How often each kind of answer is drawn. The target at the generation prompt is the expectation
over them."""
SOFT_WIDTH = 16
"""Candidates of one soft target: 12 words, the bullet, the domain, and two spare."""
CHATS_PER_ROW = 4
SOFT_SLOTS = 32
"""Soft targets in one row: the generation prompts' in the first CHATS_PER_ROW slots, then those
inside word lists while there is room; a place in a list without room has its next token as the
target, as every other place."""
PIECES_CHARS = 60_000
"""Part of a document that pieces for chats are cut from."""
USUAL_PIECES, SHORT_PIECES = 40, 20
"""Most pieces of one document: as long as the corpus cuts them, and from MIN_SHORT_CHARS on."""
MIN_SHORT_CHARS = 60
RAW_CHARS = 4_000
LOOK_AHEAD = 24
"""Chats among which the longest that fits a row is looked for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the assistant says, and the salient words of a list in the order they are listed, with
    their scores.

    Example:
        Answer(text="index, frame", listed=[("index", 3.1), ("frame", 4.2)])
    """

    text: str
    listed: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One tokenised chat and its soft targets by position; the first stands at the last prompt
    token.

    Example:
        Chat(prompt_ids=[1, 88, ...], answer_ids=[301, 14, 77, 2, 201], soft=[(104, {301: 0.3, 77:
        0.2, 15: 0.35, 90: 0.15})])
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    soft: list[tuple[int, dict[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed training rows; every array has the same first dimension.

    tokens, positions, segments, parts: [rows, row_tokens]; soft_positions: [rows, SOFT_SLOTS], -1
    where unused; soft_ids, soft_probabilities: [rows, SOFT_SLOTS, SOFT_WIDTH].
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    parts: np.ndarray
    soft_positions: np.ndarray
    soft_ids: np.ndarray
    soft_probabilities: np.ndarray

    def batch(self, rows: slice) -> dict[str, torch.Tensor]:
        """Tensors of the chosen rows: int64, and float32 for probabilities."""
        tensors = {
            name: torch.from_numpy(np.array(getattr(self, name)[rows]))
            for name in self.__dataclass_fields__
        }
        return {
            name: tensor if tensor.is_floating_point() else tensor.long()
            for name, tensor in tensors.items()
        }

    def save(self, folder: Path) -> None:
        for name in self.__dataclass_fields__:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Rows:
        """The arrays stay on disk, mapped: all processes share one copy."""
        return cls(
            **{
                name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in cls.__dataclass_fields__
            }
        )


@dataclass(frozen=True, kw_only=True)
class PretrainTexts:
    """What the loop reads: `(domain, text)` pieces for chats, whole texts for raw reading, and
    their documents."""

    chunks: list[tuple[str, str]]
    raw: list[str]
    doc_ids: list[str]
    twins: list[str]
    """Held-out documents of the corpus that nearly repeat one of `doc_ids`: no evidence that the
    model reads what it never saw."""
    validation: list[Chunk]
    statistics: WordStatistics


def gather_texts(config: PretrainConfig) -> PretrainTexts:
    """Chunks and raw text of train documents, many more than the corpus takes, without the held-out
    ones' twins."""
    corpus = embedded_chunks(
        CorpusConfig()
    )  # the default corpus, whatever this seed: its held-out texts are the ones to keep out
    statistics = WordStatistics.fit(chunk.text for chunk in corpus if chunk.split == "train")
    held_out = [chunk.text for chunk in corpus if chunk.split != "train"]
    by_domain: dict[str, list] = {}
    for source in list_sources():
        if split_of(source.doc_id) == "train":
            by_domain.setdefault(source.domain, []).append(source)
    chunks, raw, doc_ids, heads = [], [], [], []
    for domain, sources in sorted(by_domain.items()):
        known = {source.doc_id: source for source in sources}
        pieces: list[str] = []
        for doc_id in seeded_order(list(known), config.seed)[: config.documents_per_domain]:
            if (text := read_source(known[doc_id])) is not None:
                doc_ids.append(doc_id)
                heads.append(text[:HEAD_CHARS])
                draw = random.Random(seed_of(config.seed, "pretrain", doc_id))
                pieces += _pieces_of(text, doc_id, draw)
                raw.append(_raw_window(text, draw))
        random.Random(seed_of(config.seed, domain)).shuffle(pieces)
        chunks += [(domain, piece) for piece in pieces[: config.chunks_per_domain]]
    keep = _first_ones(held_out + [text for _, text in chunks])[len(held_out) :]
    raw_keep = _first_ones(raw)
    validation = [chunk for chunk in corpus if chunk.split == "validation"]
    return PretrainTexts(
        chunks=[chunk for chunk, kept in zip(chunks, keep, strict=True) if kept],
        raw=[text for text, kept in zip(raw, raw_keep, strict=True) if kept],
        doc_ids=sorted(doc_ids),
        twins=find_twins({chunk.doc_id for chunk in corpus if chunk.split != "train"}, heads),
        validation=validation,
        statistics=statistics,
    )


def find_twins(doc_ids: Iterable[str], heads: list[str]) -> list[str]:
    """Those of the embedded documents whose beginning is a near duplicate of one of `heads`,
    sorted."""
    sources = {source.doc_id: source for source in list_sources()}
    doc_ids = sorted(doc_ids)
    own = minhash_signatures(
        [(read_source(sources[doc_id]) or "")[:HEAD_CHARS] for doc_id in doc_ids]
    )
    is_twin = has_twin(own, minhash_signatures(heads), CorpusConfig().near_duplicate_jaccard)
    return [doc_id for doc_id, found in zip(doc_ids, is_twin, strict=True) if found]


def _first_ones(texts: list[str]) -> np.ndarray:
    return first_of_clusters(minhash_signatures(texts), CorpusConfig().near_duplicate_jaccard)


def _pieces_of(text: str, doc_id: str, draw: random.Random) -> list[str]:
    usual = cut_chunks(text[:PIECES_CHARS], seed_key=f"{doc_id}/pretrain")
    short = cut_chunks(text[:PIECES_CHARS], seed_key=f"{doc_id}/short", min_chars=MIN_SHORT_CHARS)
    usual, short = (
        [piece for piece in pieces if is_informative(piece)] for pieces in (usual, short)
    )
    draw.shuffle(usual)
    draw.shuffle(short)
    return usual[:USUAL_PIECES] + short[:SHORT_PIECES]


def _raw_window(text: str, draw: random.Random) -> str:
    start = draw.randrange(max(1, len(text) - RAW_CHARS))
    return text[start : start + RAW_CHARS]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, marker: str):
    """Byte-level BPE with ChatML; the marker is the last id, an ordinary token that decoding keeps.

    Words are split exactly as Qwen2's tokenizer splits them, because every loader builds that class
    for this architecture, whatever the files say.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    pattern = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=TURN_END,
        pad_token=TEXT_END,
        unk_token=TEXT_END,
        extra_special_tokens=[TURN_START],
    )
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != vocab_size or tokenizer.convert_tokens_to_ids(marker) != vocab_size - 1:
        raise RuntimeError(
            f"tokenizer training gave {len(tokenizer)} tokens, expected {vocab_size}: the text is"
            " too small for that vocabulary. Lower vocab_size or give more text."
        )
    return tokenizer


def compose_answer(
    text: str,
    domain: str,
    statistics: WordStatistics,
    words: list[tuple[str, float]],
    draw: random.Random,
) -> Answer:
    """One drawn answer about a text with these salient words.

    Words are listed in a random order in which, at every place, the next one is drawn in proportion
    to its tf-idf among those that are left (Plackett-Luce): `next_word_shares` is the exact
    expectation.
    """
    kind = draw.choices(list(ANSWER_SHARES), weights=list(ANSWER_SHARES.values()))[0]
    if kind == "words" and words:
        order = sorted(words, key=lambda pair: -math.log(1.0 - draw.random()) / pair[1])
        return Answer(text=", ".join(word for word, _ in order), listed=order)
    if kind == "description":
        teacher = draw.choice((ContentFirstTeacher, FormatFirstTeacher))(statistics)
        return Answer(text=clean_label(teacher.describe(text, domain)), listed=[])
    return Answer(text=observe(text, domain, statistics).kind, listed=[])


def next_word_shares(left: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """How likely each of the words that are left comes next: its score over the sum of theirs."""
    total = sum(score for _, score in left)
    return [(word, score / total) for word, score in left]


def prompt_target(
    first_id_of: Callable[[str], int], words: Sequence[tuple[str, float]], kind: str
) -> dict[int, float]:
    """Next-token distribution at the generation prompt: the expectation over answer kinds and word
    orders.

    `first_id_of` maps a string to the id of its first token. Sums to 1.
    """
    without_words = 0.0 if words else ANSWER_SHARES["words"]
    return _by_token(
        first_id_of,
        [
            *(
                (word, ANSWER_SHARES["words"] * share)
                for word, share in (next_word_shares(words) if words else ())
            ),
            ("- ", ANSWER_SHARES["description"]),
            (kind, ANSWER_SHARES["domain"] + without_words),
        ],
    )


def list_targets(
    encode: Callable[[str], list[int]], listed: Sequence[tuple[str, float]]
) -> list[tuple[int, dict[int, float]]]:
    """The soft targets inside a word list: (index of the comma in the answer's tokens, the words
    left after it)."""
    targets = []
    position = 0
    for index, (word, _) in enumerate(listed[:-1]):
        position += len(encode(f" {word}" if index else word))
        left = next_word_shares(listed[index + 1 :])
        targets.append(
            (
                position,
                _by_token(
                    lambda string: encode(string)[0], [(f" {word}", share) for word, share in left]
                ),
            )
        )
        position += 1
    return targets


def _by_token(
    first_id_of: Callable[[str], int], shares: Iterable[tuple[str, float]]
) -> dict[int, float]:
    target: dict[int, float] = {}
    for string, share in shares:
        token = first_id_of(string)
        target[token] = target.get(token, 0.0) + share
    return target


def build_chats(texts: PretrainTexts, tokenizer, config: PretrainConfig) -> list[Chat]:
    """One chat a chunk, tokenised; chats longer than a row are left out."""
    known: dict[str, list[int]] = {}

    def encode(string: str) -> list[int]:
        if string not in known:
            known[string] = tokenizer(string)["input_ids"]
        return known[string]

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
        inside = [
            (len(prompt_ids) + offset, left) for offset, left in list_targets(encode, answer.listed)
        ]
        chats.append(
            Chat(
                prompt_ids=prompt_ids,
                answer_ids=answer_ids,
                soft=[(len(prompt_ids) - 1, target), *inside],
            )
        )
    return [
        chat for chat in chats if len(chat.prompt_ids) + len(chat.answer_ids) <= config.row_tokens
    ]


def raw_segments(texts: Sequence[str], tokenizer, seed: int) -> Iterator[list[int]]:
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
    """Rows without padding: chats that fit together, the rest filled with raw text; every
    `1/raw_share`-th less.

    Attention never crosses samples: `segments` numbers them within a row and `positions` restart at
    0.
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
            piece, pending = (
                pending[: config.row_tokens - start],
                pending[config.row_tokens - start :],
            )
            start, raw_tokens = (
                _place_raw(rows, row, segment, start, piece),
                raw_tokens + len(piece),
            )
            segment += 1
    return rows


def _find_fitting(waiting: list[Chat], room: int) -> int | None:
    """Index of the longest chat that fits, among the last ones."""
    best, best_size = None, 0
    for index in range(max(0, len(waiting) - LOOK_AHEAD), len(waiting)):
        size = len(waiting[index].prompt_ids) + len(waiting[index].answer_ids)
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
