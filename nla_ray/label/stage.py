"""The labels of a run: every teacher's description of every text, cleaned, with one drawn for each
text.

One output file a corpus shard, so a run that was cut off continues with the shards that are
missing. The draw depends on the text's id and the seed alone.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.label.cleaner import clean_label
from nla_ray.label.imports import ImportedLabel, Refusal, read_labels
from nla_ray.label.schema import LABEL_SCHEMA
from nla_ray.label.teacher import make_teachers
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.identity import SPLITS, Split, seed_of, text_hash
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import LabelConfig
from nla_ray.text.stage import read_shards
from nla_ray.text.words import WordStatistics

logger = get_logger(__name__)


Row = dict[str, Any]
Describe = Callable[[Row], list[tuple[str, str]]]
"""A corpus row -> its raw labels as (teacher, raw)."""


@dataclass
class LabelCounts:
    """What the stage reports."""

    texts: int = 0
    labels: int = 0
    unlabelled_texts: int = 0
    words: int = 0


def label_texts(run: Run) -> Manifest:
    """The stage: `part-00000.parquet` ... of LABEL_SCHEMA, sorted by (text_id, teacher). Skipped
    when complete.

    With `label.import_path` the labels come from that file; refused rows are listed in
    `refused.jsonl`. Raises ValueError when no text has a label, and when the imported file has
    changed since.
    """
    corpus = run.require("corpus")
    stage = run.open("labels")
    config = run.config.label
    imported = _file_hash(config.import_path)
    if stage.manifest is not None:
        _require_same_import(stage.manifest.metrics.get("import_sha256"), imported, config)
        return stage.manifest
    refused: list[Refusal] = []
    _remember_import(stage, imported, config)
    describe = (
        _offline_labels(run, corpus, config)
        if imported is None
        else _imported_labels(run, corpus, config, refused)
    )
    counts = LabelCounts()
    with stage.local_folder() as folder:
        documents = _label_shards(run, corpus, describe, folder, config, counts)
        if imported is not None:
            _write_lines(folder / "refused.jsonl", [asdict(refusal) for refusal in refused])
    reasons = dict(sorted(Counter(refusal.reason for refusal in refused).items()))
    _require_labels(stage, counts, reasons)
    logger.info(
        "labels: %d of %d texts, %d labels%s",
        counts.texts - counts.unlabelled_texts,
        counts.texts,
        counts.labels,
        f", refused: {reasons}" if reasons else "",
    )
    mean_words = round(counts.words / counts.labels, 2)
    metrics = {
        **asdict(counts),
        "mean_words": mean_words,
        "refused": reasons,
        "import_sha256": imported,
    }
    return stage.publish(documents=documents, metrics=metrics)


def load_labels(run: Run, split: Split) -> list[Row]:
    """The labels of one split as rows of LABEL_SCHEMA, sorted by (text_id, teacher)."""
    manifest = run.require("labels")
    rows: list[Row] = []
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


def label_row(row: Row, raw_labels: Sequence[tuple[str, str]], config: LabelConfig) -> list[Row]:
    """LABEL_SCHEMA rows of one text, sorted by teacher; exactly one is drawn when any label
    survives cleaning."""
    cleaned = [
        (teacher, raw, clean_label(raw, config.max_words)) for teacher, raw in sorted(raw_labels)
    ]
    cleaned = [entry for entry in cleaned if entry[2]]
    drawn = seed_of(config.seed, "style", row["text_id"]) % len(cleaned) if cleaned else -1
    known = {name: row[name] for name in ("text_id", "doc_id", "split", "domain")}
    return [
        {**known, "teacher": teacher, "raw": raw, "label": label, "drawn": index == drawn}
        for index, (teacher, raw, label) in enumerate(cleaned)
    ]


def _label_shards(
    run: Run,
    corpus: Manifest,
    describe: Describe,
    folder: Path,
    config: LabelConfig,
    counts: LabelCounts,
) -> dict[str, list[str]]:
    """Label shard by shard, leaving out those that are there; returns the labelled documents by
    split."""
    documents: dict[str, set[str]] = {split: set() for split in SPLITS}
    for name, table in read_shards(run, corpus):
        target = folder / name
        if target.exists():
            rows = pq.read_table(target).to_pylist()
        else:
            rows = [
                label
                for row in table.to_pylist()
                for label in label_row(row, describe(row), config)
            ]
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


def _offline_labels(run: Run, corpus: Manifest, config: LabelConfig) -> Describe:
    train = (
        text
        for _, table in read_shards(run, corpus)
        for text, split in zip(table["text"].to_pylist(), table["split"].to_pylist(), strict=True)
        if split == "train"
    )
    teachers = make_teachers(config.teachers, WordStatistics.fit(train))
    return lambda row: [
        (teacher.name, teacher.describe(row["text"], row["domain"])) for teacher in teachers
    ]


def _imported_labels(
    run: Run, corpus: Manifest, config: LabelConfig, refused: list[Refusal]
) -> Describe:
    """Labels from the file, by text hash; refusals are appended to `refused`."""
    text_of_document: dict[str, set[str]] = {}
    for _, table in read_shards(run, corpus):
        for doc_id, text in zip(
            table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True
        ):
            text_of_document.setdefault(doc_id, set()).add(text_hash(text))
    by_hash: dict[str, list[tuple[str, str]]] = {}
    for item in read_labels(Path(str(config.import_path)).expanduser(), text_of_document):
        if isinstance(item, ImportedLabel) and clean_label(item.raw, config.max_words):
            by_hash.setdefault(item.text_hash, []).append((item.teacher, item.raw))
        elif isinstance(item, ImportedLabel):
            refused.append(
                Refusal(line=item.line, doc_id="", reason="nothing is left after cleaning")
            )
        else:
            refused.append(item)
    return lambda row: by_hash.get(text_hash(row["text"]), [])


def _file_hash(path: str | None) -> str | None:
    if path is None:
        return None
    place = Path(path).expanduser()
    return Location.of(place).record().sha256 if place.is_file() else "missing"


def _remember_import(stage: Artifact, imported: str | None, config: LabelConfig) -> None:
    """Write down which content labels are made from before the first is made: what goes on later
    must meet the same."""
    note = stage.location / "scratch" / "import_sha256"
    if imported in (None, "missing"):
        return
    if note.exists():
        _require_same_import(note.read_text(), imported, config)
    note.write_text(imported)


def _require_same_import(there: str | None, imported: str | None, config: LabelConfig) -> None:
    if imported not in (there, "missing"):
        raise ValueError(
            f"label.import_path {config.import_path}: got content with sha256 {str(imported)[:12]},"
            f" expected {str(there)[:12]}, from which the run's labels were made. Restore the file"
            " or use another --run-dir."
        )


def _require_labels(stage: Artifact, counts: LabelCounts, reasons: dict[str, int]) -> None:
    if counts.labels == 0:
        raise ValueError(
            f"labels in {stage.location}: got no label for any of {counts.texts} texts (refused:"
            f" {reasons or 'none'}), expected at least one. See refused.jsonl there; labels must"
            " carry texts of this corpus."
        )


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
