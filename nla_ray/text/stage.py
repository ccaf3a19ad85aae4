"""Builds the corpus: chooses documents, cuts chunks, removes duplicates, writes shards.

Two sources, one result. It protects two rules: the choice depends on ids and the seed alone, never
on order or time; and no two chunks, nor two documents, of the result are near duplicates, so none
straddles a split.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.run.artifact import Run
from nla_ray.run.identity import SPLITS, seed_of
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import (
    CHUNK_SCHEMA,
    HEAD_CHARS,
    Chunk,
    CutDocument,
    choose_chunks,
    cut_document,
    distinct_chunks,
    distinct_documents,
)
from nla_ray.text.documents import Document, Reject, read_documents
from nla_ray.text.duplicates import minhash_signatures

EMBEDDED_CORPUS = "nla_ray.nano.embedded_corpus:embedded_chunks"
"""Where texts come from when no `corpus.path` is given; loaded only then."""

logger = get_logger(__name__)


def read_chunks(run: Run, columns: Sequence[str]) -> pa.Table:
    """These columns of every chunk of a complete corpus, verified, in its order; all of them in
    memory."""
    return pa.concat_tables(
        [table for _, table in read_shards(run, run.require("corpus"), columns)]
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
    stage, config = run.open("corpus"), run.config.corpus
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
                pkgutil.resolve_name(EMBEDDED_CORPUS)(config)
                if config.path is None
                else user_chunks(config, rejects)
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
    documents = distinct_documents(ordered, config)
    chunks = list(
        distinct_chunks([chunk for document in documents for chunk in document.chunks], config)
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


def _cut_user_document(document: Document, config: CorpusConfig) -> CutDocument | Reject:
    """One chunk of a short document, unchanged; several of a longer one."""
    text = document.text
    pieces = (
        [text]
        if len(text) <= config.chunk_chars
        else cut_document(text, document.doc_id, config, fill=True)
    )
    pieces = [piece for piece in pieces if len(piece.strip()) >= config.min_chunk_chars]
    if not pieces:
        return Reject(source=document.doc_id, line=0, reason="shorter than corpus.min_chunk_chars")
    return CutDocument(
        doc_id=document.doc_id,
        chunks=choose_chunks(document.doc_id, document.domain, pieces, config),
        signature=minhash_signatures([text[:HEAD_CHARS]])[0],
    )


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
