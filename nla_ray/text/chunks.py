"""Documents cut into chunks: where to cut, which chunks to take, which repeat others.

Protects the rule that every choice depends on ids and the seed alone, never on order or time.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from nla_ray.run.identity import Split, seed_of, split_of
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.duplicates import first_of_clusters, minhash_signatures

TEXT_FIELDS = [
    pa.field("text_id", pa.string(), nullable=False),
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("domain", pa.string(), nullable=False),
]

CHUNK_SCHEMA = pa.schema(
    [
        *TEXT_FIELDS,
        pa.field("chunk_index", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""One text: `text_id` = `{doc_id}#{chunk_index}`; rows are sorted by text_id."""
MIN_CHUNK_CHARS, MAX_CHUNK_CHARS = 240, 420
CHARS_PER_DISTINCT_WORD = 40
"""A chunk needs one distinct word for so many characters; less is a table of numbers."""
_WORD = re.compile(r"[A-Za-z]{3,}")


def cut_chunks(
    text: str,
    *,
    seed_key: str,
    min_chars: int = MIN_CHUNK_CHARS,
    max_chars: int = MAX_CHUNK_CHARS,
    fill: bool = False,
) -> list[str]:
    """Consecutive pieces of the text, cut at line ends, each of a seeded length in [min_chars,
    max_chars].

    A line that is longer than max_chars is cut at a space. Pieces below min_chars are left out: the
    end of the text, and what stands before a line that does not fit any more. `fill`: that line is
    cut too, so that prose in long lines loses nothing but its end.
    """
    draw = random.Random(f"{seed_key}/cut")
    chunks, lines, size = [], [], 0
    target = draw.randint(min_chars, max_chars)
    for line in _bounded_lines(text, max_chars):
        if lines and size + len(line) + 1 > target:
            if (
                fill and size <= min_chars
            ):  # size counts a line break at the end, which the piece does not have
                spaced, least = (
                    line + " ",
                    max(1, min_chars - size),
                )  # the line's end will do as well
                space = max(
                    spaced.rfind(" ", least, target - size + 1),
                    spaced.find(" ", least, max_chars - size + 1),
                )
                if space > 0:
                    lines.append(line[:space])
                    line = line[space:].lstrip()
            chunks.append("\n".join(lines).strip("\n"))
            lines, size, target = [], 0, draw.randint(min_chars, max_chars)
        if line.strip() or lines:
            lines.append(line)
            size += len(line) + 1
    chunks.append("\n".join(lines).strip("\n"))
    return [chunk for chunk in chunks if min_chars <= len(chunk) <= max_chars]


def is_informative(chunk: str) -> bool:
    """Whether a piece of program text has words to tell it by; tables of numbers have not."""
    return len(set(_WORD.findall(chunk))) >= max(3, len(chunk) // CHARS_PER_DISTINCT_WORD)


def _bounded_lines(text: str, max_chars: int) -> Iterator[str]:
    for line in text.split("\n"):
        while len(line) > max_chars:
            cut = line.rfind(" ", max_chars // 2, max_chars)
            cut = cut if cut > 0 else max_chars
            yield line[:cut]
            line = line[cut:].lstrip()
        yield line


def seeded_order(doc_ids: list[str], seed: int) -> list[str]:
    """The ids in an order that depends on nothing but the seed and each id."""
    return sorted(doc_ids, key=lambda doc_id: hashlib.sha256(f"{seed}/{doc_id}".encode()).digest())


HEAD_CHARS = 8_000
"""Part of a document that is compared with other documents."""
MIN_CHARS_SHARE = 4 / 7
"""Shortest cut of a document, as a share of the longest: 240 of 420 characters."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One text of the corpus, a row of CHUNK_SCHEMA.

    Example:
        Chunk(text_id="licence/numpy/LICENSE#2", doc_id="licence/numpy/LICENSE", split="train",
        domain="licence",
              chunk_index=2, text="Redistribution and use ...")
    """

    text_id: str
    doc_id: str
    split: Split
    domain: str
    chunk_index: int
    text: str


@dataclass(frozen=True, kw_only=True)
class CutDocument:
    """A document's chunks in seeded order, and the signature by which it is compared with other
    documents.

    `signature`: uint32 [bins].
    """

    doc_id: str
    chunks: list[Chunk]
    signature: np.ndarray = field(repr=False)


def cut_document(text: str, doc_id: str, config: CorpusConfig, *, fill: bool = False) -> list[str]:
    shortest = max(1, round(config.chunk_chars * MIN_CHARS_SHARE))
    return cut_chunks(
        text, seed_key=doc_id, min_chars=shortest, max_chars=config.chunk_chars, fill=fill
    )


def choose_chunks(doc_id: str, domain: str, pieces: list[str], config: CorpusConfig) -> list[Chunk]:
    """Up to chunks_per_document of the pieces, in seeded order; chunk_index is the place among
    them."""
    draw = random.Random(seed_of(config.seed, "chunks", doc_id))
    chosen = draw.sample(range(len(pieces)), min(config.chunks_per_document, len(pieces)))
    return [
        Chunk(
            text_id=f"{doc_id}#{index}",
            doc_id=doc_id,
            split=split_of(doc_id, config.test_share),
            domain=domain,
            chunk_index=index,
            text=pieces[index],
        )
        for index in chosen
    ]


def first_chunks_first(documents: list[CutDocument]) -> list[Chunk]:
    """The first chunk of every document, then the second of every document, and so on."""
    ranked = [(rank, chunk) for document in documents for rank, chunk in enumerate(document.chunks)]
    return [chunk for _, chunk in sorted(ranked, key=lambda item: item[0])]


def distinct_documents(documents: list[CutDocument], config: CorpusConfig) -> list[CutDocument]:
    if not documents:
        return []
    keep = first_of_clusters(
        np.stack([document.signature for document in documents]), config.near_duplicate_jaccard
    )
    return [document for document, kept in zip(documents, keep, strict=True) if kept]


def distinct_chunks(chunks: list[Chunk], config: CorpusConfig) -> Iterator[Chunk]:
    if chunks:
        keep = first_of_clusters(
            minhash_signatures([chunk.text for chunk in chunks]), config.near_duplicate_jaccard
        )
        yield from (chunk for chunk, kept in zip(chunks, keep, strict=True) if kept)
