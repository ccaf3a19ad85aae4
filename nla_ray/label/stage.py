"""The stage `labels`: every teacher's label of every text, cleaned, with one drawn for each text.

The only file of the room that knows a run. It writes one file a corpus shard, so a run that was cut
off continues with the missing shards. Protects the rule that labels of two contents of an imported
file are never mixed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.label.cleaner import clean_label
from nla_ray.label.imports import RefusedLabel, read_labels
from nla_ray.label.rows import LABEL_SCHEMA, LabelRow, label_rows
from nla_ray.label.teacher import Teacher, make_teachers
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.identity import SPLITS, Split, text_hash
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import LabelConfig
from nla_ray.text.stage import read_shards
from nla_ray.text.words import WordStatistics

logger = get_logger(__name__)

RawLabels = Callable[[Mapping[str, Any]], Sequence[tuple[str, str]]]
"""A row of CHUNK_SCHEMA -> the text's raw labels as (teacher, raw label)."""
_MISSING = "missing"
"""In place of the hash of an imported file that is gone: a complete stage does not need it."""


@dataclass
class LabelCounts:
    """What the stage reports."""

    texts: int = 0
    labels: int = 0
    unlabelled_texts: int = 0
    words: int = 0


# making -------------------------------------------------------------------------------------------


def label_texts(run: Run) -> Manifest:
    """The stage: `part-00000.parquet` ... of LABEL_SCHEMA, sorted by (text_id, teacher).

    Skipped when complete. With `label.import_path` the labels come from that file; refused rows are
    listed in `refused.jsonl`. Raises ValueError when no text has a label, and when the imported
    file has changed since.
    """
    corpus = run.require("corpus")
    artifact, config = run.open("labels"), run.config.label
    import_sha256 = _import_hash(config)
    if artifact.manifest is not None:
        recorded = artifact.manifest.metrics.get("import_sha256")
        _require_same_import(recorded, import_sha256, config)
        return artifact.manifest
    refused: list[RefusedLabel] = []
    _remember_import(artifact, import_sha256, config)
    if import_sha256 is None:
        raw_labels = _offline_labels(run, corpus, config)
    else:
        raw_labels = _imported_labels(run, corpus, config, refused)
    counts = LabelCounts()
    with artifact.local_folder() as folder:
        documents = _label_shards(run, corpus, raw_labels, folder, config, counts)
        if import_sha256 is not None:
            lines = [json.dumps(asdict(label)) + "\n" for label in refused]
            (folder / "refused.jsonl").write_text("".join(lines))
    reasons = dict(sorted(Counter(label.reason for label in refused).items()))
    _require_labels(artifact, counts, reasons)
    logger.info(
        "labels: %d of %d texts, %d labels%s",
        counts.texts - counts.unlabelled_texts,
        counts.texts,
        counts.labels,
        f", refused: {reasons}" if reasons else "",
    )
    metrics = {
        **asdict(counts),
        "mean_words": round(counts.words / counts.labels, 2),
        "refused": reasons,
        "import_sha256": import_sha256,
    }
    return artifact.publish(documents=documents, metrics=metrics)


def _label_shards(
    run: Run,
    corpus: Manifest,
    raw_labels: RawLabels,
    folder: Path,
    config: LabelConfig,
    counts: LabelCounts,
) -> dict[str, list[str]]:
    """Label shard by shard, leaving out those already labelled; returns documents by split.

    Adds what it sees to `counts`.
    """
    documents: dict[str, set[str]] = {split: set() for split in SPLITS}
    for name, table in read_shards(run, corpus):
        target = folder / name
        if target.exists():
            rows = pq.read_table(target).to_pylist()
        else:
            rows = list(_label_table(table, raw_labels, config))
            temporary = target.with_suffix(".tmp")
            pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), temporary)
            os.replace(temporary, target)
        counts.texts += table.num_rows
        counts.labels += len(rows)
        counts.unlabelled_texts += table.num_rows - len({row["text_id"] for row in rows})
        counts.words += sum(len(row["label"].split()) for row in rows)
        for row in rows:
            documents[row["split"]].add(row["doc_id"])
    return {split: sorted(ids) for split, ids in documents.items()}


def _label_table(table: pa.Table, raw_labels: RawLabels, config: LabelConfig) -> Iterator[LabelRow]:
    for text in table.to_pylist():
        yield from label_rows(text, raw_labels(text), config)


# where raw labels come from -----------------------------------------------------------------------


def _offline_labels(run: Run, corpus: Manifest, config: LabelConfig) -> RawLabels:
    """Labels of the configured teachers, who know the words of the train texts."""
    statistics = WordStatistics.fit(_train_texts(run, corpus))
    return partial(_ask_teachers, make_teachers(config.teachers, statistics))


def _train_texts(run: Run, corpus: Manifest) -> Iterator[str]:
    for _, table in read_shards(run, corpus, ["text", "split"]):
        for row in table.to_pylist():
            if row["split"] == "train":
                yield row["text"]


def _ask_teachers(teachers: Sequence[Teacher], text: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(teacher.name, teacher.describe(text["text"], text["domain"])) for teacher in teachers]


def _imported_labels(
    run: Run, corpus: Manifest, config: LabelConfig, refused: list[RefusedLabel]
) -> RawLabels:
    """Labels of the imported file, by text hash; appends what is not taken to `refused`."""
    hashes_by_document: dict[str, set[str]] = {}
    for _, table in read_shards(run, corpus, ["doc_id", "text"]):
        for row in table.to_pylist():
            hashes_by_document.setdefault(row["doc_id"], set()).add(text_hash(row["text"]))
    by_hash: dict[str, list[tuple[str, str]]] = {}
    for label in read_labels(Path(str(config.import_path)).expanduser(), hashes_by_document):
        if isinstance(label, RefusedLabel):
            refused.append(label)
        elif clean_label(label.raw, config.max_words):
            by_hash.setdefault(label.text_hash, []).append((label.teacher, label.raw))
        else:
            reason = "nothing is left after cleaning"
            refused.append(RefusedLabel(line=label.line, doc_id="", reason=reason))
    return partial(_look_up, by_hash)


def _look_up(
    by_hash: Mapping[str, list[tuple[str, str]]], text: Mapping[str, Any]
) -> list[tuple[str, str]]:
    return by_hash.get(text_hash(text["text"]), [])


def _import_hash(config: LabelConfig) -> str | None:
    """SHA-256 of the imported file; None where labels come from teachers."""
    if config.import_path is None:
        return None
    path = Path(config.import_path).expanduser()
    return Location.of(path).record().sha256 if path.is_file() else _MISSING


def _remember_import(artifact: Artifact, sha256: str | None, config: LabelConfig) -> None:
    """Note the imported content before the first label: what continues later must meet the same."""
    note = artifact.location / "scratch" / "import_sha256"
    if sha256 in (None, _MISSING):
        return
    if note.exists():
        _require_same_import(note.read_text(), sha256, config)
    note.write_text(sha256)


def _require_same_import(recorded: str | None, sha256: str | None, config: LabelConfig) -> None:
    if sha256 not in (recorded, _MISSING):
        raise ValueError(
            f"label.import_path {config.import_path}: got content with sha256 {str(sha256)[:12]},"
            f" expected {str(recorded)[:12]}, from which the run's labels were made. Restore the"
            " file or use another --run-dir."
        )


def _require_labels(artifact: Artifact, counts: LabelCounts, reasons: dict[str, int]) -> None:
    if counts.labels == 0:
        raise ValueError(
            f"labels in {artifact.location}: got no label for any of {counts.texts} texts (refused:"
            f" {reasons or 'none'}), expected at least one. See refused.jsonl there; labels must"
            " carry texts of this corpus."
        )


# reading ------------------------------------------------------------------------------------------


def load_labels(run: Run, split: Split) -> list[LabelRow]:
    """The labels of one split as rows of LABEL_SCHEMA, sorted by (text_id, teacher)."""
    manifest = run.require("labels")
    rows: list[LabelRow] = []
    for path in sorted(name for name in manifest.files if name.endswith(".parquet")):
        location = run.verified("labels", manifest, path)
        with location.filesystem.open_input_file(location.path) as file:
            rows += pq.read_table(file, filters=[("split", "=", split)]).to_pylist()
    return sorted(rows, key=lambda row: (row["text_id"], row["teacher"]))


def drawn_labels(run: Run, split: Split) -> dict[str, str]:
    """Text id -> the one label drawn for the text."""
    return {row["text_id"]: row["label"] for row in load_labels(run, split) if row["drawn"]}


def all_labels(run: Run, split: Split) -> dict[str, list[str]]:
    """Text id -> every teacher's label of the text, by teacher."""
    labels: dict[str, list[str]] = {}
    for row in load_labels(run, split):
        labels.setdefault(row["text_id"], []).append(row["label"])
    return labels
