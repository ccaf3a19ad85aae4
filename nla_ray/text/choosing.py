"""Which pieces of which documents become the chunks of a corpus.

Knows cut documents and their signatures; where documents come from is elsewhere. Protects the rule
that every choice depends on ids and the seed alone, never on order or time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nla_ray.run.identity import seed_of, split_of
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import Chunk
from nla_ray.text.duplicates import first_of_clusters, minhash_signatures

HEAD_CHARS = 8_000
"""Part of a document that is compared with other documents."""


@dataclass(frozen=True, kw_only=True)
class CutDocument:
    """A document's chunks in seeded order, and what it is compared with other documents by."""

    doc_id: str
    chunks: list[Chunk]
    signature: np.ndarray = field(repr=False)
    """Of its first HEAD_CHARS characters, as `minhash_signatures` makes it: uint32 [bins]."""
    fingerprint: np.ndarray | None = field(default=None, repr=False)
    """Of its beginning, as `shingles.fingerprint` makes it; None: only its chunks are compared."""
    group: str | None = None
    """The family that the user says it is of."""


def seeded_order(ids: Sequence[str], seed: int) -> list[str]:
    """The ids in an order that depends on nothing but the seed and each id."""
    return sorted(ids, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())


def choose_chunks(doc_id: str, domain: str, pieces: list[str], config: CorpusConfig) -> list[Chunk]:
    """Up to chunks_per_document of a document's pieces, in seeded order.

    A chunk's `chunk_index` is the index of its piece.
    """
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


def first_chunks_first(documents: Sequence[CutDocument]) -> list[Chunk]:
    """The first chunk of every document, then the second of every document, and so on."""
    ranked = [(rank, chunk) for document in documents for rank, chunk in enumerate(document.chunks)]
    return [chunk for _, chunk in sorted(ranked, key=lambda pair: pair[0])]


def distinct_documents(documents: list[CutDocument], config: CorpusConfig) -> list[CutDocument]:
    """The documents in their order, without those that nearly repeat an earlier one."""
    if not documents:
        return []
    signatures = np.stack([document.signature for document in documents])
    keep = first_of_clusters(signatures, config.near_duplicate_jaccard)
    return [document for document, kept in zip(documents, keep, strict=True) if kept]


def distinct_chunks(chunks: list[Chunk], config: CorpusConfig) -> list[Chunk]:
    """The chunks in their order, without those that nearly repeat an earlier one."""
    signatures = minhash_signatures([chunk.text for chunk in chunks])
    keep = first_of_clusters(signatures, config.near_duplicate_jaccard)
    return [chunk for chunk, kept in zip(chunks, keep, strict=True) if kept]
