"""Builds the corpus: chooses documents, cuts chunks, removes duplicates, assigns splits."""

import random
from dataclasses import dataclass

from nla_ray.corpus.dedup import find_first_of_clusters
from nla_ray.corpus.embedded import Source, cut_chunks, list_sources, read_source, seeded_order
from nla_ray.records import Split, seed_of, split_of

DOMAIN_SHARE = 1 / 8
"""Most chunks one domain may have, as a share of max_chunks."""
DOCUMENTS_PER_CHUNK = 0.7
"""Documents read for each chunk of a domain's quota: many documents, few chunks of each."""
HEAD_CHARS = 8_000
"""Part of a document that is compared with other documents."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One text of the corpus, a row of CHUNK_SCHEMA.

    Example:
        Chunk(text_id="licence/numpy/LICENSE#2", doc_id="licence/numpy/LICENSE", split="train", domain="licence",
              chunk_index=2, text="Redistribution and use ...")
    """

    text_id: str
    doc_id: str
    split: Split
    domain: str
    chunk_index: int
    text: str


def embedded_chunks(*, max_chunks: int = 12_500, chunks_per_document: int = 4, threshold: float = 0.7, seed: int = 0) -> list[Chunk]:
    """The embedded corpus, sorted by text_id; the same on every run in one environment."""
    quota = int(max_chunks * DOMAIN_SHARE)
    documents = _choose_documents(list_sources(), int(quota * DOCUMENTS_PER_CHUNK), seed, threshold)
    candidates: list[Chunk] = []
    for pieces in documents.values():
        candidates += _choose_chunks(pieces, 2 * quota, chunks_per_document, seed)
    keep = find_first_of_clusters([chunk.text for chunk in candidates], threshold)
    chosen: list[Chunk] = []
    taken: dict[str, int] = {}
    for chunk, kept in zip(candidates, keep, strict=True):
        if kept and taken.get(chunk.domain, 0) < quota:
            taken[chunk.domain] = taken.get(chunk.domain, 0) + 1
            chosen.append(chunk)
    order = {text_id: rank for rank, text_id in enumerate(seeded_order([chunk.text_id for chunk in chosen], seed))}
    chosen = sorted(chosen, key=lambda chunk: order[chunk.text_id])[:max_chunks]
    return sorted(chosen, key=lambda chunk: chunk.text_id)


def _choose_documents(sources: list[Source], limit: int, seed: int, threshold: float) -> dict[str, list[tuple[Source, list[str]]]]:
    """Up to `limit` documents a domain that can be cut, without near duplicates of an earlier one."""
    by_domain: dict[str, dict[str, Source]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, {})[source.doc_id] = source
    picked: list[tuple[Source, list[str]]] = []
    heads: list[str] = []
    for _, known in sorted(by_domain.items()):
        count = 0
        for doc_id in seeded_order(list(known), seed):
            text = read_source(known[doc_id])
            if text is not None and (pieces := cut_chunks(text[:60_000], seed_key=doc_id)):
                picked.append((known[doc_id], pieces))
                heads.append(text[:HEAD_CHARS])
                count += 1
            if count == limit:
                break
    keep = find_first_of_clusters(heads, threshold)
    documents: dict[str, list[tuple[Source, list[str]]]] = {}
    for (source, pieces), kept in zip(picked, keep, strict=True):
        if kept:
            documents.setdefault(source.domain, []).append((source, pieces))
    return documents


def _choose_chunks(documents: list[tuple[Source, list[str]]], limit: int, per_document: int, seed: int) -> list[Chunk]:
    """Seeded chunks of each document, first ones of all documents before second ones, up to `limit`."""
    ranked: list[tuple[int, int, Chunk]] = []
    for order, (source, pieces) in enumerate(documents):
        draw = random.Random(seed_of(seed, "chunks", source.doc_id))
        for rank, index in enumerate(draw.sample(range(len(pieces)), min(per_document, len(pieces)))):
            ranked.append((rank, order, _make_chunk(source, index, pieces[index])))
    ranked.sort(key=lambda item: item[:2])
    return [chunk for _, _, chunk in ranked[:limit]]


def _make_chunk(source: Source, index: int, text: str) -> Chunk:
    return Chunk(
        text_id=f"{source.doc_id}#{index}", doc_id=source.doc_id, split=split_of(source.doc_id), domain=source.domain,
        chunk_index=index, text=text,
    )
