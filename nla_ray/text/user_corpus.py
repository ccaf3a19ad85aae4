"""The corpus of a user's texts: documents read one by one, cut, and the chosen ones kept.

Protects the rule that memory is bounded by `corpus.max_chunks`, whatever the size of the source.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.settings.config import CorpusConfig, require
from nla_ray.text.choosing import (
    HEAD_CHARS,
    CutDocument,
    choose_chunks,
    distinct_chunks,
    distinct_documents,
)
from nla_ray.text.cutting import cut_document
from nla_ray.text.documents import Document, read_documents
from nla_ray.text.duplicates import minhash_signatures
from nla_ray.text.families import SourceTexts
from nla_ray.text.rejects import Reject, RejectsFile
from nla_ray.text.shingles import fingerprint, shingle_hashes

COMPARED_CHARS = 16_000
"""Part of a document that is searched for what it shares with others: 5 kB of fingerprint."""

logger = get_logger(__name__)


def user_texts(config: CorpusConfig, rejects: RejectsFile) -> SourceTexts:
    """The user's texts, sorted by text_id, at most max_chunks; rows left out go to `rejects`.

    Raises ValueError when `group_field` was set and no document has it.
    """
    documents, num_read = _kept_documents(config, rejects)
    documents = distinct_documents(documents, config)
    chunks = [chunk for document in documents for chunk in document.chunks]
    chunks = distinct_chunks(chunks, config)
    logger.info(
        "corpus: %d documents read, %d after duplicates, %d texts of which at most %d are kept"
        " (corpus.max_chunks)",
        num_read,
        len(documents),
        len(chunks),
        config.max_chunks,
    )
    groups = {document.doc_id: document.group for document in documents if document.group}
    require(
        bool(groups) or config.group_field == CorpusConfig.group_field or not documents,
        "corpus.group_field",
        config.group_field,
        "a field or column that some document has",
        "Correct --corpus.group-field.",
    )
    return SourceTexts(
        chunks=sorted(chunks[: config.max_chunks], key=lambda chunk: chunk.text_id),
        fingerprints={
            document.doc_id: document.fingerprint
            for document in documents
            if document.fingerprint is not None
        },
        groups=groups,
    )


def _kept_documents(config: CorpusConfig, rejects: RejectsFile) -> tuple[list[CutDocument], int]:
    """Documents with 2 * max_chunks chunks, in the order of their ids' hashes; how many were read.

    Of a larger source, the documents whose ids hash lowest are kept: the choice does not depend on
    the order of the source.
    """
    heap: list[tuple[int, str, CutDocument]] = []
    """The document of the highest hash on top: the first to go when there are too many."""
    num_chunks = num_read = 0
    for item in read_documents(config):
        document = item if isinstance(item, Reject) else _cut_user_document(item, config)
        if isinstance(document, Reject):
            rejects.add(document)
            continue
        num_read += 1
        rank = seed_of(config.seed, "choose", document.doc_id)
        heapq.heappush(heap, (-rank, document.doc_id, document))
        num_chunks += len(document.chunks)
        while num_chunks - len(heap[0][2].chunks) >= 2 * config.max_chunks:
            num_chunks -= len(heapq.heappop(heap)[2].chunks)
    ordered = sorted(heap, key=lambda entry: (-entry[0], entry[1]))
    return [document for _, _, document in ordered], num_read


def _cut_user_document(document: Document, config: CorpusConfig) -> CutDocument | Reject:
    """One chunk of a short document, unchanged; several of a longer one.

    A conversation is one chunk: none is cut inside a turn.
    """
    text = document.text
    if len(text) <= config.chunk_chars:
        pieces = [text]
    elif document.messages is not None:
        reason = "conversation longer than corpus.chunk_chars"
        return Reject(source=document.doc_id, line=0, reason=reason)
    else:
        pieces = cut_document(text, document.doc_id, config.chunk_chars, fill=True)
    pieces = [piece for piece in pieces if len(piece.strip()) >= config.min_chunk_chars]
    if not pieces:
        return Reject(source=document.doc_id, line=0, reason="shorter than corpus.min_chunk_chars")
    chunks = choose_chunks(document.doc_id, document.domain, pieces, config)
    return CutDocument(
        doc_id=document.doc_id,
        chunks=[dataclasses.replace(chunk, messages=document.messages) for chunk in chunks],
        signature=minhash_signatures([text[:HEAD_CHARS]])[0],
        fingerprint=_fingerprint(text) if config.families else None,
        group=document.group,
    )


def _fingerprint(text: str) -> np.ndarray:
    return fingerprint(shingle_hashes([text[:COMPARED_CHARS]])[0])
