"""The stage `labels`: every teacher's label of every subject, cleaned, with one drawn for each.

A subject is a text, or a text up to a position where activations are captured inside texts or
inside the base's answers to them. The only file of the room that knows a run. It writes one file a
corpus shard, so a run that was cut off continues with the missing shards. Protects the rules that
labels of two contents of an imported file are never mixed, and that no label of a whole text is
learned from an activation inside it.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.positions import Skipped, TextEncoder
from nla_ray.activation.stage import read_answers
from nla_ray.base.load import load_tokenizer
from nla_ray.base.sources import base_folder, tokenizer_digest
from nla_ray.label.cleaner import clean_label
from nla_ray.label.imports import Positions, RefusedLabel, read_labels
from nla_ray.label.instructions import CLEANER_PROMPT, TeacherPrompt
from nla_ray.label.network import NOTHING_LEFT, NetworkLabels, RawLabels, UnlabelledSubject
from nla_ray.label.rows import LABEL_SCHEMA, POSITION_SCHEMA, LabelRow, label_rows, subject_of
from nla_ray.label.store import AnswerStore
from nla_ray.label.subjects import Subject, subject_id, subjects_of
from nla_ray.label.teacher import Teacher, make_teachers
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.blocks import gather_blocks, text_row_bytes
from nla_ray.run.identity import SPLITS, Split, text_hash
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import LabelConfig
from nla_ray.settings.positions import PositionRule
from nla_ray.text.stage import read_shards
from nla_ray.text.words import WordStatistics

logger = get_logger(__name__)

_WHOLE_TEXTS = "last"
"""In place of `capture.positions`, where labels are of whole texts."""
_BLOCK_BYTES = 32 << 20
"""Of labels written at once; as Python objects they take several times as much."""
STORE_NAME = "teacher_answers"
"""Folder of a run with what teachers on the network answered, where no other is named. It is no
artifact: labels may be deleted and made again of it."""
_PAYER_NAME = "payer"
"""File of a run with the name by which stores know what it has spent, wherever it is moved."""
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

    Where activations are captured inside texts, of POSITION_SCHEMA, for every captured position.
    Skipped when complete. With `label.import_path` the labels come from that file; refused rows are
    listed in `refused.jsonl`, as are texts on which a teacher over the network gave no label.
    Raises ValueError when no text has a label, when the imported file has changed since, and for
    what `ask_teachers` raises it.
    """
    corpus = run.require("corpus")
    artifact, config = run.open("labels", inputs=_inputs(run) or None), run.config.label
    import_sha256 = _import_hash(config)
    if artifact.manifest is not None:
        recorded = artifact.manifest.metrics.get("import_sha256")
        _require_same_import(recorded, import_sha256, config)
        return artifact.manifest
    refused: list[RefusedLabel | UnlabelledSubject] = []
    _remember_import(artifact, import_sha256, config)
    encoder = None if _of_whole_texts(run) else _encoder(run)
    counts = LabelCounts()
    with artifact.local_folder() as folder, ExitStack() as stack:
        if import_sha256 is None:
            raw_labels = _offline_labels(run, corpus, config)
        else:
            raw_labels = _imported_labels(run, corpus, config, refused)
        clean, network = clean_label, None
        if _is_networked(config):
            _delete_shards(folder)  # a text that had no answer then may have one now
            network = stack.enter_context(_network_labels(run, corpus, encoder, raw_labels))
            raw_labels, clean = network.raw_labels, network.clean
        documents = _label_shards(run, corpus, raw_labels, clean, encoder, folder, counts)
        refused += network.refused if network else []
        if import_sha256 is not None or network is not None:
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
        **({"asked": network.metrics} if network else {}),
    }
    return artifact.publish(documents=documents, metrics=metrics)


def _label_shards(
    run: Run,
    corpus: Manifest,
    raw_labels: RawLabels,
    clean: Callable[[str, int], str],
    encoder: TextEncoder | None,
    folder: Path,
    counts: LabelCounts,
) -> dict[str, list[str]]:
    """Label shard by shard, leaving out those already labelled; returns documents by split.

    `encoder`: where labels are of positions. Adds what it sees to `counts`.
    """
    schema = LABEL_SCHEMA if encoder is None else POSITION_SCHEMA
    documents: dict[str, set[str]] = {split: set() for split in SPLITS}
    for name, table in read_shards(run, corpus):
        target = folder / name
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            texts = _with_answers(run, name, table)
            rows = _label_table(texts, raw_labels, clean, encoder, run.config.label)
            _write_labels(rows, schema, temporary)
            os.replace(temporary, target)
        counts.texts += table.num_rows
        labelled: set[str] = set()
        columns = ["split", "doc_id", "text_id", "label"]
        for batch in pq.ParquetFile(target).iter_batches(columns=columns):
            for row in batch.to_pylist():
                labelled.add(row["text_id"])
                documents[row["split"]].add(row["doc_id"])
                counts.words += len(row["label"].split())
            counts.labels += batch.num_rows
        counts.unlabelled_texts += table.num_rows - len(labelled)
    return {split: sorted(ids) for split, ids in documents.items()}


def _write_labels(rows: Iterable[LabelRow], schema: pa.Schema, target: Path) -> None:
    """A row group a block: a shard may have more labels than memory holds as Python objects."""
    with pq.ParquetWriter(target, schema) as writer:
        for block in gather_blocks(rows, _row_bytes, _BLOCK_BYTES):
            writer.write_table(pa.Table.from_pylist(block, schema=schema))


def _row_bytes(row: LabelRow) -> int:
    strings = ("text_id", "doc_id", "teacher", "raw", "label")
    return text_row_bytes(sum(len(row[name]) for name in strings))


def _with_answers(run: Run, shard: str, table: pa.Table) -> Iterator[dict[str, Any]]:
    """The texts of a shard as `subjects_of` takes them."""
    answers = read_answers(run, run.config.capture, shard)
    for text in table.to_pylist():
        yield {**text, "answer": answers.get(text["text_id"], ())}


def _label_table(
    texts: Iterable[dict[str, Any]],
    raw_labels: RawLabels,
    clean: Callable[[str, int], str],
    encoder: TextEncoder | None,
    config: LabelConfig,
) -> Iterator[LabelRow]:
    for text in texts:
        for subject in subjects_of(text, encoder):
            yield from label_rows(subject, raw_labels(subject), config, clean)


def _of_whole_texts(run: Run) -> bool:
    return PositionRule.of(run.config.capture.positions).of_whole_texts


def _encoder(run: Run) -> TextEncoder:
    """What capture finds positions with; it knows no weights."""
    base = run.config.base
    return TextEncoder(load_tokenizer(base), base, run.config.capture)


def _inputs(run: Run) -> dict[str, str]:
    """What labels depend on beside their settings: a prompt's content, and positions."""
    config, prompts = run.config.label, {}
    if config.asked:
        prompts["prompt"] = TeacherPrompt.load(config.prompt).sha256
    if config.asked_cleaner is not None:
        prompts["cleaner_prompt"] = TeacherPrompt.load(CLEANER_PROMPT).sha256
    return prompts | _position_inputs(run)


def _position_inputs(run: Run) -> dict[str, str]:
    """What labels of positions depend on beside their settings; nothing for whole texts."""
    positions, base = run.config.capture.positions, run.config.base
    if _of_whole_texts(run):
        return {}
    digest = tokenizer_digest(base_folder(base.model, weights=False))
    return {
        "positions": positions,
        "tokenizer": digest,
        "max_tokens": str(base.max_tokens),
        "date": base.date,
        # Labels made before there was another template say nothing of it.
        **({"template": base.template} if base.template != "chat" else {}),
    }


# where raw labels come from -----------------------------------------------------------------------


def _offline_labels(run: Run, corpus: Manifest, config: LabelConfig) -> RawLabels:
    """Labels of the configured offline teachers, who know the words of the train texts."""
    is_any = len(config.asked) < len(config.teachers)  # else nobody needs them
    statistics = WordStatistics.fit(_train_texts(run, corpus) if is_any else ())
    return partial(_ask_teachers, make_teachers(config.teachers, statistics))


def _train_texts(run: Run, corpus: Manifest) -> Iterator[str]:
    for _, table in read_shards(run, corpus, ["text", "split"]):
        for row in table.to_pylist():
            if row["split"] == "train":
                yield row["text"]


def _ask_teachers(teachers: Sequence[Teacher], subject: Subject) -> list[tuple[str, str]]:
    domain = subject.text["domain"]
    return [(teacher.name, teacher.describe(subject.read, domain)) for teacher in teachers]


def _delete_shards(folder: Path) -> None:
    for path in folder.glob("part-*.parquet"):
        path.unlink()


def _is_networked(config: LabelConfig) -> bool:
    return bool(config.asked) or config.asked_cleaner is not None


@contextmanager
def _network_labels(
    run: Run, corpus: Manifest, encoder: TextEncoder | None, others: RawLabels
) -> Iterator[NetworkLabels]:
    """Labels of all sources, once models over the network have been asked."""
    left_out: dict[str, str] = {}
    num_texts = sum(table.num_rows for _, table in read_shards(run, corpus, ["text_id"]))
    with AnswerStore(_store_location(run), run=_store_name(run)) as store:
        network = NetworkLabels(run.config.label, store, others, left_out)
        network.ask(partial(_captured_subjects, run, corpus, encoder, left_out), num_texts)
        yield network


def _store_location(run: Run) -> Location:
    store = run.config.label.store
    if store is None:
        return run.root / STORE_NAME
    return Location.of(store if "://" in store else Path(store).expanduser())


def _store_name(run: Run) -> str:
    """By what a store knows who pays: the name that a run got where it first paid.

    Before there was the file, a run paid by the hash of its place: it goes on with that.
    """
    kept = run.root / _PAYER_NAME
    if not kept.exists():
        kept.write_text(text_hash(str(run.root))[:16])
    return kept.read_text()


def _captured_subjects(
    run: Run, corpus: Manifest, encoder: TextEncoder | None, left_out: dict[str, str]
) -> Iterator[list[Subject]]:
    """The subjects of every text, as capture reads them.

    A text that capture leaves out is not paid for: its id and the reason go to `left_out`.
    """
    reader = encoder or _encoder(run)
    for name, table in read_shards(run, corpus):
        for text in _with_answers(run, name, table):
            try:
                if encoder is None:
                    reader.encode(text["text_id"], text["text"], text.get("messages"))
            except Skipped as skipped:
                left_out[text["text_id"]] = f"not captured: {skipped.reason}"
                yield []
                continue
            yield list(subjects_of(text, encoder))


def _imported_labels(
    run: Run, corpus: Manifest, config: LabelConfig, refused: list[RefusedLabel | UnlabelledSubject]
) -> RawLabels:
    """Labels of the imported file, by text and position; appends what is not taken to `refused`."""
    hashes_by_document: dict[str, set[str]] = {}
    for _, table in read_shards(run, corpus, ["doc_id", "text"]):
        for row in table.to_pylist():
            hashes_by_document.setdefault(row["doc_id"], set()).add(text_hash(row["text"]))
    by_subject: dict[tuple[str, int | None], list[tuple[str, str]]] = {}
    labels = read_labels(
        Path(str(config.import_path)).expanduser(),
        hashes_by_document,
        _captured_positions(run, corpus),
        of_whole_texts=_of_whole_texts(run),
    )
    for label in labels:
        if isinstance(label, RefusedLabel):
            refused.append(label)
        elif clean_label(label.raw, config.max_words):
            of_subject = by_subject.setdefault((label.text_hash, label.position), [])
            of_subject.append((label.teacher, label.raw))
        else:
            refused.append(RefusedLabel(line=label.line, doc_id="", reason=NOTHING_LEFT))
    return partial(_look_up, by_subject)


def _look_up(
    by_subject: Mapping[tuple[str, int | None], list[tuple[str, str]]], subject: Subject
) -> list[tuple[str, str]]:
    return by_subject.get((text_hash(subject.text["text"]), subject.position), [])


def _captured_positions(run: Run, corpus: Manifest) -> Positions:
    """The positions of every text; they are found when the first label names one."""

    @functools.cache
    def by_hash() -> dict[str, dict[int, int]]:
        encoder = _encoder(run)
        found: dict[str, dict[int, int]] = {}
        for name, table in read_shards(run, corpus):
            for text in _with_answers(run, name, table):
                found[text_hash(text["text"])] = {
                    subject.position: subject.n_raw_tokens for subject in subjects_of(text, encoder)
                }
        return found

    return lambda digest: by_hash().get(digest, {})


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
    """The labels of one split as rows of LABEL_SCHEMA or POSITION_SCHEMA.

    They are sorted by (text_id, position, teacher).
    """
    manifest = run.require("labels")
    rows: list[LabelRow] = []
    for path in sorted(name for name in manifest.files if name.endswith(".parquet")):
        location = run.verified("labels", manifest, path)
        with location.filesystem.open_input_file(location.path) as file:
            rows += pq.read_table(file, filters=[("split", "=", split)]).to_pylist()
    return sorted(rows, key=lambda row: (row["text_id"], row.get("position") or 0, row["teacher"]))


def drawn_labels(run: Run, split: Split) -> dict[str, str]:
    """Subject id -> the one label drawn for the subject."""
    return {subject_of(row): row["label"] for row in load_labels(run, split) if row["drawn"]}


def all_labels(run: Run, split: Split) -> dict[str, list[str]]:
    """Subject id -> every teacher's label of the subject, by teacher."""
    return labels_by_subject(load_labels(run, split))


def labels_by_subject(rows: Iterable[LabelRow]) -> dict[str, list[str]]:
    """Subject id -> the labels of the subject, in the order of the rows."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        labels.setdefault(subject_of(row), []).append(row["label"])
    return labels


def activation_subjects(run: Run, table: ActivationTable) -> list[str]:
    """The subject id of every activation: by it its labels are found.

    Raises ValueError when the run's labels are of other subjects: see `require_labels_of`.
    """
    manifest = run.require("activations")
    positions = manifest.config["capture"]["positions"]
    require_labels_of(
        run,
        positions,
        manifest.model.get("tokenizer_digest", ""),
        manifest.model.get("template", "chat"),
        manifest.parents.get("answers"),
    )
    if PositionRule.of(positions).of_whole_texts:
        return list(table.text_ids)
    if "prompt_digest" not in manifest.model:
        folder = run.root / "activations"
        raise ValueError(
            f"activations in {folder}: got activations inside whole texts, as an earlier version"
            f" kept them, expected each with the text up to it. Delete {folder} and run"
            " jobs/capture.py."
        )
    pairs = zip(table.text_ids, table.positions, strict=True)
    return [subject_id(text_id, position) for text_id, position in pairs]


def require_labels_of(
    run: Run, positions: str, tokenizer: str, template: str = "chat", answers: str | None = None
) -> None:
    """Raise ValueError unless the run's labels are of activations at these positions.

    `positions`: as `capture.positions` says it; `tokenizer`: the digest of the one that counts;
    `template`: `base.template`, which decides where in a prompt a text stands; `answers`: the
    fingerprint of those that positions are in.
    """
    manifest = run.require("labels")
    inputs = manifest.config.get("inputs", {})
    labelled = inputs.get("positions", _WHOLE_TEXTS)
    positions = _WHOLE_TEXTS if PositionRule.of(positions).of_whole_texts else positions
    template_of = inputs.get("template", "chat")
    got = labelled, inputs.get("tokenizer"), template_of, manifest.parents.get("answers")
    expected = positions, tokenizer, template, answers
    if _WHOLE_TEXTS in (labelled, positions):  # the end of a text is its end in any tokens
        got, expected = got[:1], expected[:1]
    if got != expected:
        folder = run.root / "labels"
        raise ValueError(
            f"labels in {folder}: got labels of capture.positions {_told(got)},"
            f" expected {_told(expected)}, as the activations are. What a text says"
            " after a position is not in the activation there, so a label must be of the text up"
            f" to it. Delete {folder} and run jobs/label.py with the flags of jobs/capture.py;"
            " labels made elsewhere say by `position` or `n_raw_tokens` up to where they describe"
            " a text."
        )


def _told(what: tuple[str | None, ...]) -> str:
    """Positions, and where they are inside a text the tokenizer, template and answers."""
    if len(what) == 1:
        return str(what[0])
    positions, tokenizer, template, answers = what
    told = f"{positions} of tokenizer {tokenizer}, template {template}"
    return told if answers is None else f"{told}, answers {answers}"
