"""What the small base reads: pieces of train documents for chats, and their raw text.

Knows the embedded corpus and its documents. Protects the rule that only train documents are read,
and no piece of them that a held-out text of the corpus nearly repeats; held-out documents that
nearly repeat a whole train document are listed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nla_ray.nano.embedded_corpus import embedded_chunks
from nla_ray.nano.installed_texts import list_sources, read_source
from nla_ray.run.identity import seed_of, split_of
from nla_ray.settings.config import CorpusConfig, PretrainConfig
from nla_ray.text.choosing import HEAD_CHARS, seeded_order
from nla_ray.text.chunks import Chunk
from nla_ray.text.cutting import cut_chunks, is_informative
from nla_ray.text.duplicates import first_of_clusters, has_twin, minhash_signatures
from nla_ray.text.words import WordStatistics

PIECES_CHARS = 60_000
"""Part of a document that pieces for chats are cut from."""
USUAL_PIECES, SHORT_PIECES = 40, 20
"""Most pieces of one document: as long as the corpus cuts them, and from MIN_SHORT_CHARS on."""
MIN_SHORT_CHARS = 60
RAW_CHARS = 4_000
"""Part of a document that is read as raw text."""


@dataclass(frozen=True, kw_only=True)
class PretrainTexts:
    """Everything that pretraining reads, and which documents it is from."""

    chunks: list[tuple[str, str]]
    """(domain, piece of a document), for chats."""
    raw: list[str]
    """Parts of documents, read as they are."""
    doc_ids: list[str]
    """Of the train documents that chunks and raw texts are from."""
    twins: list[str]
    """Held-out documents of the corpus that nearly repeat a document of `doc_ids`.

    They are no evidence that the model reads what it never saw.
    """
    validation: list[Chunk]
    statistics: WordStatistics


def gather_texts(config: PretrainConfig) -> PretrainTexts:
    """Chunks and raw text of train documents, many more than the corpus takes, without twins.

    The corpus is the default one under every seed: its held-out texts are kept out.
    """
    corpus = embedded_chunks(CorpusConfig())
    statistics = WordStatistics.fit(chunk.text for chunk in corpus if chunk.split == "train")
    held_out = [chunk.text for chunk in corpus if chunk.split != "train"]
    sources = {source.doc_id: source for source in list_sources()}
    ids_by_domain: dict[str, list[str]] = {}
    for source in sources.values():
        if split_of(source.doc_id) == "train":
            ids_by_domain.setdefault(source.domain, []).append(source.doc_id)
    chunks, raw, doc_ids, heads = [], [], [], []
    for domain, domain_ids in sorted(ids_by_domain.items()):
        pieces: list[str] = []
        for doc_id in seeded_order(domain_ids, config.seed)[: config.documents_per_domain]:
            if (text := read_source(sources[doc_id])) is not None:
                doc_ids.append(doc_id)
                heads.append(text[:HEAD_CHARS])
                draw = random.Random(seed_of(config.seed, "pretrain", doc_id))
                pieces += _pieces_of(text, doc_id, draw)
                raw.append(_raw_window(text, draw))
        random.Random(seed_of(config.seed, domain)).shuffle(pieces)
        chunks += [(domain, piece) for piece in pieces[: config.chunks_per_domain]]
    keep = _distinct(held_out + [text for _, text in chunks])[len(held_out) :]
    raw_keep = _distinct(raw)
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
    """The documents whose beginning nearly repeats one of `heads`, sorted."""
    sources = {source.doc_id: source for source in list_sources()}
    doc_ids = sorted(doc_ids)
    beginnings = [(read_source(sources[doc_id]) or "")[:HEAD_CHARS] for doc_id in doc_ids]
    are_twins = has_twin(
        minhash_signatures(beginnings),
        minhash_signatures(heads),
        CorpusConfig().near_duplicate_jaccard,
    )
    return [doc_id for doc_id, is_twin in zip(doc_ids, are_twins, strict=True) if is_twin]


def _distinct(texts: list[str]) -> np.ndarray:
    """Mask: True for the texts that nearly repeat no earlier text."""
    return first_of_clusters(minhash_signatures(texts), CorpusConfig().near_duplicate_jaccard)


def _pieces_of(text: str, doc_id: str, draw: random.Random) -> list[str]:
    usual = cut_chunks(text[:PIECES_CHARS], seed_key=f"{doc_id}/pretrain")
    short = cut_chunks(text[:PIECES_CHARS], seed_key=f"{doc_id}/short", min_chars=MIN_SHORT_CHARS)
    usual = [piece for piece in usual if is_informative(piece)]
    short = [piece for piece in short if is_informative(piece)]
    draw.shuffle(usual)
    draw.shuffle(short)
    return usual[:USUAL_PIECES] + short[:SHORT_PIECES]


def _raw_window(text: str, draw: random.Random) -> str:
    start = draw.randrange(max(1, len(text) - RAW_CHARS))
    return text[start : start + RAW_CHARS]
