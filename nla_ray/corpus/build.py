"""Builds the corpus: chooses documents, cuts chunks, removes duplicates, writes shards.

Two sources, one result. It protects two rules: the choice depends on ids and the seed alone, never
on order or time; and no two chunks, nor two documents, of the result are near duplicates, so none
straddles a split.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.artifacts import Location, Run
from nla_ray.config import CorpusConfig
from nla_ray.corpus.dedup import first_of_clusters, minhash_signatures
from nla_ray.corpus.embedded import (
    Source,
    cut_chunks,
    is_informative,
    list_sources,
    read_source,
    seeded_order,
)
from nla_ray.corpus.readers import Document, Reject, read_documents
from nla_ray.manifest import Manifest
from nla_ray.records import CHUNK_SCHEMA, SPLITS, Split, seed_of, split_of
from nla_ray.runlog import get_logger

logger = get_logger(__name__)

DOMAIN_SHARE = 1 / 8
"""Most chunks one embedded domain may have, as a share of max_chunks."""
DOCUMENTS_PER_CHUNK = 0.7
"""Documents read for each chunk of a domain's quota: many documents, few chunks of each."""
CANDIDATES_PER_CHUNK = 1.5
"""Chunks read at least for each chunk of a domain's quota: up to a third of them repeat others."""
HEAD_CHARS = 8_000
"""Part of a document that is compared with other documents."""
CUT_CHARS = 60_000
"""Part of an embedded document that chunks are taken from."""
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


def read_chunks(run: Run, columns: Sequence[str]) -> pa.Table:
    """These columns of every chunk of a complete corpus, verified, in its order; all of them in
    memory."""
    return pa.concat_tables(
        [table for _, table in read_shards(run, run.require("corpus", "corpus"), columns)]
    )


def read_shards(
    run: Run, corpus: Manifest, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """Every shard's path and table, verified, one after the other; all columns when none are
    named."""
    for path in sorted(name for name in corpus.files if name.endswith(".parquet")):
        location = run.verified("corpus", corpus, path)
        with location.filesystem.open_input_file(location.path) as file:
            yield path, pq.read_table(file, columns=columns and list(columns))


def build_corpus(run: Run) -> Manifest:
    """The stage: shards `part-00000.parquet` ... sorted by text_id, and `rejects.jsonl`. Skipped
    when complete.

    Raises ValueError when no usable text is left, with the reasons and their counts, or when the
    user's file has changed since.
    """
    stage, config = run.stage("corpus", "corpus"), run.config.corpus
    source = _source_hash(config)
    if stage.manifest is not None:
        before = stage.manifest.metrics.get("source_sha256")
        if None not in (before, source) and before != source:
            raise ValueError(
                f"corpus.path {config.path}: got content with sha256 {source[:12]}, expected"
                f" {before[:12]}, from which {stage.location} was made. The file has changed:"
                " restore it or use another --run-dir."
            )
        return stage.manifest
    with stage.local_folder() as folder:
        rejects = RejectsFile(folder / "rejects.jsonl")
        with rejects:
            chunks = (
                embedded_chunks(config) if config.path is None else user_chunks(config, rejects)
            )
        if not chunks:
            raise ValueError(
                f"corpus {config.path or 'embedded'}: got no usable text ({rejects.describe()}),"
                f" expected at least one. See {stage.location}/rejects.jsonl; check --corpus.path"
                " and --corpus.text-field."
            )
        write_shards(chunks, folder, config.shard_rows)
    documents = {
        split: [chunk.doc_id for chunk in chunks if chunk.split == split] for split in SPLITS
    }
    metrics = {**describe_corpus(chunks, rejects.counts), "source_sha256": source}
    logger.info(
        "corpus: %d texts of %d documents; %s",
        len(chunks),
        metrics["num_documents"],
        rejects.describe(),
    )
    return stage.publish(documents=documents, metrics=metrics)


def _source_hash(config: CorpusConfig) -> str | None:
    """SHA-256 of the user's file, where it is one and is still there: a complete corpus does not
    need it any more."""
    path = Path(config.path).expanduser() if config.path is not None else None
    return Location.of(path).record().sha256 if path is not None and path.is_file() else None


def embedded_chunks(config: CorpusConfig) -> list[Chunk]:
    """The embedded corpus, sorted by text_id; the same on every run in one environment."""
    quota = int(config.max_chunks * DOMAIN_SHARE)
    limit = int(quota * max(DOCUMENTS_PER_CHUNK, CANDIDATES_PER_CHUNK / config.chunks_per_document))
    documents = _distinct(_embedded_documents(list_sources(), limit, config), config)
    by_domain: dict[str, list[CutDocument]] = {}
    for document in documents:
        by_domain.setdefault(document.chunks[0].domain, []).append(document)
    candidates = [
        chunk for members in by_domain.values() for chunk in _first_ones_first(members)[: 2 * quota]
    ]
    taken: Counter[str] = Counter()
    chosen = []
    for chunk in _distinct_chunks(candidates, config):
        if taken[chunk.domain] < quota:
            taken[chunk.domain] += 1
            chosen.append(chunk)
    order = {
        text_id: rank
        for rank, text_id in enumerate(
            seeded_order([chunk.text_id for chunk in chosen], config.seed)
        )
    }
    chosen = sorted(chosen, key=lambda chunk: order[chunk.text_id])[: config.max_chunks]
    return sorted(chosen, key=lambda chunk: chunk.text_id)


def user_chunks(config: CorpusConfig, rejects: RejectsFile) -> list[Chunk]:
    """The user's texts, sorted by text_id. Memory is bounded by max_chunks, whatever the size of
    the source.

    Of a larger source, the documents whose ids hash lowest are kept: the choice does not depend on
    their order.
    """
    kept: list[tuple[int, str, CutDocument]] = []
    num_chunks = num_documents = 0
    for item in read_documents(config):
        document = item if isinstance(item, Reject) else _cut_user_document(item, config)
        if isinstance(document, Reject):
            rejects.add(document)
            continue
        num_documents += 1
        # A heap with the highest hash on top: the first to go when there are too many.
        heapq.heappush(
            kept, (-seed_of(config.seed, "choose", document.doc_id), document.doc_id, document)
        )
        num_chunks += len(document.chunks)
        while num_chunks - len(kept[0][2].chunks) >= 2 * config.max_chunks:
            num_chunks -= len(heapq.heappop(kept)[2].chunks)
    ordered = [document for _, _, document in sorted(kept, key=lambda entry: (-entry[0], entry[1]))]
    documents = _distinct(ordered, config)
    chunks = list(
        _distinct_chunks([chunk for document in documents for chunk in document.chunks], config)
    )
    logger.info(
        "corpus: %d documents read, %d after duplicates, %d texts of which at most %d are kept"
        " (corpus.max_chunks)",
        num_documents,
        len(documents),
        len(chunks),
        config.max_chunks,
    )
    return sorted(chunks[: config.max_chunks], key=lambda chunk: chunk.text_id)


def _embedded_documents(
    sources: list[Source], limit: int, config: CorpusConfig
) -> list[CutDocument]:
    """Up to `limit` documents a domain, in seeded order."""
    by_domain: dict[str, dict[str, Source]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, {})[source.doc_id] = source
    documents: list[CutDocument] = []
    heads: list[str] = []
    for domain, known in sorted(by_domain.items()):
        start = len(heads)
        for doc_id in seeded_order(list(known), config.seed):
            text = read_source(known[doc_id])
            pieces = _cut(text[:CUT_CHARS], doc_id, config) if text is not None else []
            if chunks := _choose_chunks(
                doc_id, domain, [piece for piece in pieces if is_informative(piece)], config
            ):
                documents.append(CutDocument(doc_id=doc_id, chunks=chunks, signature=np.empty(0)))
                heads.append(text[:HEAD_CHARS])
            if len(heads) - start == limit:
                break
    signatures = minhash_signatures(heads)
    return [
        dataclasses.replace(document, signature=row)
        for document, row in zip(documents, signatures, strict=True)
    ]


def _cut_user_document(document: Document, config: CorpusConfig) -> CutDocument | Reject:
    """One chunk of a short document, unchanged; several of a longer one."""
    text = document.text
    pieces = (
        [text]
        if len(text) <= config.chunk_chars
        else _cut(text, document.doc_id, config, fill=True)
    )
    pieces = [piece for piece in pieces if len(piece.strip()) >= config.min_chunk_chars]
    if not pieces:
        return Reject(source=document.doc_id, line=0, reason="shorter than corpus.min_chunk_chars")
    return CutDocument(
        doc_id=document.doc_id,
        chunks=_choose_chunks(document.doc_id, document.domain, pieces, config),
        signature=minhash_signatures([text[:HEAD_CHARS]])[0],
    )


def _cut(text: str, doc_id: str, config: CorpusConfig, *, fill: bool = False) -> list[str]:
    shortest = max(1, round(config.chunk_chars * MIN_CHARS_SHARE))
    return cut_chunks(
        text, seed_key=doc_id, min_chars=shortest, max_chars=config.chunk_chars, fill=fill
    )


def _choose_chunks(
    doc_id: str, domain: str, pieces: list[str], config: CorpusConfig
) -> list[Chunk]:
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


def _first_ones_first(documents: list[CutDocument]) -> list[Chunk]:
    """The first chunk of every document, then the second of every document, and so on."""
    ranked = [(rank, chunk) for document in documents for rank, chunk in enumerate(document.chunks)]
    return [chunk for _, chunk in sorted(ranked, key=lambda item: item[0])]


def _distinct(documents: list[CutDocument], config: CorpusConfig) -> list[CutDocument]:
    if not documents:
        return []
    keep = first_of_clusters(
        np.stack([document.signature for document in documents]), config.near_duplicate_jaccard
    )
    return [document for document, kept in zip(documents, keep, strict=True) if kept]


def _distinct_chunks(chunks: list[Chunk], config: CorpusConfig) -> Iterator[Chunk]:
    if chunks:
        keep = first_of_clusters(
            minhash_signatures([chunk.text for chunk in chunks]), config.near_duplicate_jaccard
        )
        yield from (chunk for chunk, kept in zip(chunks, keep, strict=True) if kept)


class RejectsFile:
    """Rows that were left out, one JSON object a line, and their number by reason. A context
    manager."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> RejectsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, reject: Reject) -> None:
        """Write one line. Reasons that name an id are counted under their first words."""
        self.counts[reject.reason.split(" doc_id ")[0]] += 1
        self._file.write(json.dumps(dataclasses.asdict(reject)) + "\n")

    def describe(self) -> str:
        """`3 rejected (2 empty, 1 not UTF-8)`."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{sum(self.counts.values())} rejected" + (f" ({reasons})" if reasons else "")


def write_shards(chunks: list[Chunk], folder: Path, shard_rows: int) -> None:
    """CHUNK_SCHEMA Parquet files of at most `shard_rows` rows; parts of an earlier try are removed
    first."""
    for old in folder.glob("part-*.parquet"):
        old.unlink()
    for shard, start in enumerate(range(0, len(chunks), shard_rows)):
        rows = [vars(chunk) for chunk in chunks[start : start + shard_rows]]
        pq.write_table(
            pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA), folder / f"part-{shard:05d}.parquet"
        )


def describe_corpus(chunks: Iterable[Chunk], rejected: Counter[str]) -> dict[str, object]:
    """Counts by split and domain, for the manifest."""
    chunks = list(chunks)
    by_domain = Counter(chunk.domain for chunk in chunks)
    return {
        "num_chunks": len(chunks),
        "num_documents": len({chunk.doc_id for chunk in chunks}),
        "chunks_by_split": dict(Counter(chunk.split for chunk in chunks)),
        "documents_by_split": dict(
            Counter(split for _, split in {(chunk.doc_id, chunk.split) for chunk in chunks})
        ),
        "chunks_by_domain": dict(sorted(by_domain.items())),
        "largest_domain_share": round(max(by_domain.values()) / len(chunks), 4),
        "rejected": dict(sorted(rejected.items())),
    }
