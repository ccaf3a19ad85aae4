"""The embedded corpus: chunks of text that every installation of the core dependencies has.

Protects two rules: the corpus is the same on every run in one environment; and no domain has more
than an eighth of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nla_ray.nano.installed_texts import list_sources, read_source
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.choosing import (
    HEAD_CHARS,
    CutDocument,
    choose_chunks,
    distinct_chunks,
    distinct_documents,
    first_chunks_first,
    seeded_order,
)
from nla_ray.text.chunks import Chunk
from nla_ray.text.cutting import cut_document, is_informative
from nla_ray.text.duplicates import minhash_signatures

DOMAIN_SHARE = 1 / 8
"""Most chunks one domain may have, as a share of max_chunks."""
DOCUMENTS_PER_CHUNK = 0.7
"""Documents read for each chunk of a domain's quota: many documents, few chunks of each."""
CANDIDATES_PER_CHUNK = 1.5
"""Chunks read at least for each chunk of a domain's quota: up to a third of them repeat others."""
CORPUS_CHARS = 60_000
"""Part of a document that chunks are taken from."""


def embedded_chunks(config: CorpusConfig) -> list[Chunk]:
    """The embedded corpus, sorted by text_id; the same on every run in one environment."""
    quota = int(config.max_chunks * DOMAIN_SHARE)
    limit = int(quota * max(DOCUMENTS_PER_CHUNK, CANDIDATES_PER_CHUNK / config.chunks_per_document))
    documents = distinct_documents(_cut_documents(limit, config), config)
    chunks = _up_to_quota(distinct_chunks(_candidates(documents, quota), config), quota)
    chunks = _seeded_choice(chunks, config)
    return sorted(chunks, key=lambda chunk: chunk.text_id)


def _cut_documents(limit: int, config: CorpusConfig) -> list[CutDocument]:
    """Up to `limit` documents a domain, in seeded order."""
    ids_by_domain: dict[str, list[str]] = {}
    sources = {source.doc_id: source for source in list_sources()}
    for source in sources.values():
        ids_by_domain.setdefault(source.domain, []).append(source.doc_id)
    documents: list[CutDocument] = []
    heads: list[str] = []
    for domain, doc_ids in sorted(ids_by_domain.items()):
        num_before = len(heads)
        for doc_id in seeded_order(doc_ids, config.seed):
            text = read_source(sources[doc_id]) or ""
            pieces = cut_document(text[:CORPUS_CHARS], doc_id, config.chunk_chars)
            pieces = [piece for piece in pieces if is_informative(piece)]
            if chunks := choose_chunks(doc_id, domain, pieces, config):
                documents.append(CutDocument(doc_id=doc_id, chunks=chunks, signature=np.empty(0)))
                heads.append(text[:HEAD_CHARS])
            if len(heads) - num_before == limit:
                break
    return [
        dataclasses.replace(document, signature=signature)
        for document, signature in zip(documents, minhash_signatures(heads), strict=True)
    ]


def _candidates(documents: Sequence[CutDocument], quota: int) -> list[Chunk]:
    """Of every domain twice its quota: the first chunk of every document, then the second ..."""
    by_domain: dict[str, list[CutDocument]] = {}
    for document in documents:
        by_domain.setdefault(document.chunks[0].domain, []).append(document)
    chunks: list[Chunk] = []
    for members in by_domain.values():
        chunks += first_chunks_first(members)[: 2 * quota]
    return chunks


def _up_to_quota(chunks: Sequence[Chunk], quota: int) -> list[Chunk]:
    """The first chunks of every domain."""
    taken: Counter[str] = Counter()
    kept = []
    for chunk in chunks:
        if taken[chunk.domain] < quota:
            taken[chunk.domain] += 1
            kept.append(chunk)
    return kept


def _seeded_choice(chunks: Sequence[Chunk], config: CorpusConfig) -> list[Chunk]:
    """At most max_chunks of them, chosen by seed and id."""
    by_id = {chunk.text_id: chunk for chunk in chunks}
    return [by_id[text_id] for text_id in seeded_order(list(by_id), config.seed)][
        : config.max_chunks
    ]
