"""The stage `corpus`: texts of the user's, or of the embedded default, written as shards.

The only file of the room that knows a run. Protects two rules: the same source and settings give
the same corpus; and no two chunks, nor two documents, of it are near duplicates, and documents that
share text take one split.
"""

from __future__ import annotations

import json
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.identity import SPLITS
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import CHUNK_SCHEMA, CONVERSATION_SCHEMA, Chunk
from nla_ray.text.families import (
    SourceTexts,
    chunk_shingles,
    describe_families,
    family_ids,
    with_family_splits,
)
from nla_ray.text.fields import MESSAGES_FIELD
from nla_ray.text.rejects import RejectsFile
from nla_ray.text.user_corpus import user_texts

EMBEDDED_CORPUS = "nla_ray.nano.embedded_corpus:embedded_chunks"
"""Where texts come from when no `corpus.path` is given; loaded only then."""

FAMILIES_NAME = "families.jsonl"
"""Which documents share text; absent where a corpus was made before families were found."""
LARGE_FAMILY = 0.25
"""A family of this share of the documents leaves too few others: most of them hold one form."""

logger = get_logger(__name__)


# making -------------------------------------------------------------------------------------------


def build_corpus(run: Run) -> Manifest:
    """The stage: shards `part-00000.parquet` ... sorted by text_id, families and rejects.

    Skipped when complete. Raises ValueError when no usable text is left, with the reasons and their
    counts, or when the user's file has changed since.
    """
    artifact, config = run.open("corpus"), run.config.corpus
    source_sha256 = _source_hash(config)
    if artifact.manifest is not None:
        _require_same_source(artifact, artifact.manifest, source_sha256, config)
        return artifact.manifest
    with artifact.local_folder() as folder:
        with RejectsFile(folder / "rejects.jsonl") as rejects:
            texts = _texts_of(config, rejects)
        _require_chunks(artifact, texts.chunks, rejects, config)
        shingles = chunk_shingles(texts.chunks)
        families = family_ids(texts, shingles, config)
        chunks = with_family_splits(texts.chunks, families, config)
        write_shards(chunks, folder, config.shard_rows)
        write_families(families, folder)
    found = describe_families(chunks, shingles, families)
    metrics = {**describe_corpus(chunks, rejects.counts), **found, "source_sha256": source_sha256}
    logger.info(
        "corpus: %d texts of %d documents; %s",
        len(chunks),
        metrics["num_documents"],
        rejects.describe(),
    )
    _log_families(metrics)
    return artifact.publish(documents=_documents_by_split(chunks), metrics=metrics)


def _source_hash(config: CorpusConfig) -> str | None:
    """SHA-256 of the user's file; None where there is none.

    The source may be a folder, and a complete corpus does not need its source any more.
    """
    path = Path(config.path).expanduser() if config.path is not None else None
    return Location.of(path).record().sha256 if path is not None and path.is_file() else None


def _require_same_source(
    artifact: Artifact, manifest: Manifest, sha256: str | None, config: CorpusConfig
) -> None:
    recorded = manifest.metrics.get("source_sha256")
    if recorded is not None and sha256 is not None and recorded != sha256:
        raise ValueError(
            f"corpus.path {config.path}: got content with sha256 {sha256[:12]}, expected"
            f" {recorded[:12]}, from which {artifact.location} was made. The file has changed:"
            " restore it or use another --run-dir."
        )


def _texts_of(config: CorpusConfig, rejects: RejectsFile) -> SourceTexts:
    if config.path is not None:
        return user_texts(config, rejects)
    return SourceTexts(chunks=pkgutil.resolve_name(EMBEDDED_CORPUS)(config))


def _log_families(metrics: Mapping[str, Any]) -> None:
    logger.info(
        "corpus: %d documents are joined in %d families, each in one split (the largest: %d)",
        metrics["joined_documents"],
        metrics["joined_families"],
        metrics["largest_family"],
    )
    if 1 < metrics["largest_family"] > LARGE_FAMILY * metrics["num_documents"]:
        logger.warning(
            "corpus: one family holds %d of %d documents: most of them hold the same text. Take it"
            " out of them, or name their families (--corpus.group-field)",
            metrics["largest_family"],
            metrics["num_documents"],
        )
    if any(metrics["held_out_in_train"].values()):
        logger.warning(
            "corpus: held-out texts of which half or more is in train texts: %s. Leave"
            " --corpus.families on, or give what shares text one group",
            metrics["held_out_in_train"],
        )


def _require_chunks(
    artifact: Artifact, chunks: Sequence[Chunk], rejects: RejectsFile, config: CorpusConfig
) -> None:
    if not chunks:
        raise ValueError(
            f"corpus {config.path or 'embedded'}: got no usable text ({rejects.describe()}),"
            f" expected at least one. See {artifact.location}/rejects.jsonl; check --corpus.path"
            " and --corpus.text-field."
        )


def write_shards(chunks: Sequence[Chunk], folder: Path, shard_rows: int) -> None:
    """CHUNK_SCHEMA Parquet files of at most `shard_rows` rows.

    CONVERSATION_SCHEMA where a chunk is a conversation. Parts of an earlier attempt are removed
    first.
    """
    has_messages = any(chunk.messages is not None for chunk in chunks)
    schema = CONVERSATION_SCHEMA if has_messages else CHUNK_SCHEMA
    for old in folder.glob("part-*.parquet"):
        old.unlink()
    for shard, start in enumerate(range(0, len(chunks), shard_rows)):
        rows = [vars(chunk) for chunk in chunks[start : start + shard_rows]]
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / f"part-{shard:05d}.parquet")


def write_families(families: Mapping[str, str], folder: Path) -> None:
    """A line for every document that is no family by itself, by doc_id."""
    with (folder / FAMILIES_NAME).open("w", encoding="utf-8") as file:
        for doc_id, family_id in sorted(families.items()):
            file.write(json.dumps({"doc_id": doc_id, "family_id": family_id}) + "\n")


def describe_corpus(chunks: Sequence[Chunk], rejected: Counter[str]) -> dict[str, object]:
    """Counts by split and domain, for the manifest."""
    by_domain = Counter(chunk.domain for chunk in chunks)
    split_of_document = {chunk.doc_id: chunk.split for chunk in chunks}
    return {
        "num_chunks": len(chunks),
        "num_documents": len(split_of_document),
        "chunks_by_split": dict(Counter(chunk.split for chunk in chunks)),
        "documents_by_split": dict(Counter(split_of_document.values())),
        "chunks_by_domain": dict(sorted(by_domain.items())),
        "largest_domain_share": round(max(by_domain.values()) / len(chunks), 4),
        "rejected": dict(sorted(rejected.items())),
    }


def _documents_by_split(chunks: Sequence[Chunk]) -> dict[str, list[str]]:
    """The document of every chunk, by split."""
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for chunk in chunks:
        documents[chunk.split].append(chunk.doc_id)
    return documents


# reading ------------------------------------------------------------------------------------------


def read_chunks(run: Run, columns: Sequence[str]) -> pa.Table:
    """These columns of every chunk of a complete corpus, verified, in its order, in memory."""
    shards = read_shards(run, run.require("corpus"), columns)
    return pa.concat_tables([table for _, table in shards])


def read_families(run: Run) -> dict[str, str]:
    """doc_id -> family id, of every document that is no family by itself.

    None of them in a corpus that was made before families were found.
    """
    corpus = run.find("corpus")
    if corpus is None or FAMILIES_NAME not in corpus.files:
        return {}
    lines = run.verified("corpus", corpus, FAMILIES_NAME).read_text().splitlines()
    rows = map(json.loads, lines)
    return {row["doc_id"]: row["family_id"] for row in rows}


def families_of(run: Run, doc_ids: Iterable[str]) -> list[str]:
    """The family id of each document: its own id where it shares text with no other."""
    families = read_families(run)
    return [families.get(doc_id, doc_id) for doc_id in doc_ids]


def read_shards(
    run: Run, corpus: Manifest, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table]]:
    """Path and table of every shard, verified; all columns when none are named.

    `messages` are null in a corpus without conversations.
    """
    for path in sorted(name for name in corpus.files if name.endswith(".parquet")):
        location = run.verified("corpus", corpus, path)
        with location.filesystem.open_input_file(location.path) as file:
            yield path, read_chunk_table(file, columns)


def read_chunk_table(file: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """The columns of an open shard of the corpus; all of them when none are named.

    `messages` are null in a corpus without conversations.
    """
    shard = pq.ParquetFile(file)
    names = columns and [name for name in columns if name in shard.schema_arrow.names]
    table = shard.read(columns=names)
    if columns and MESSAGES_FIELD in columns and MESSAGES_FIELD not in table.column_names:
        table = table.append_column(MESSAGES_FIELD, pa.nulls(len(table), pa.string()))
    return table
