"""Reads labels made elsewhere and joins them to the corpus by the hash of the text.

A label says something about one text, whole or up to a position. So a row is taken only when its
text, or the hash it carries, is a text of the corpus, and its position is one that is captured;
every other row is refused by line and reason, and counted. Protects the rule that a bad label costs
no good one: of a row's labels each is taken or refused by itself.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_ray.base.conversation import join_turns
from nla_ray.run.identity import text_hash
from nla_ray.settings.config import require
from nla_ray.text.documents import require_json_lines
from nla_ray.text.fields import MESSAGES_FIELD, BadRow, turns_of_field, without_marks

Positions = Callable[[str], Mapping[int, int]]
"""The hash of a text -> its captured positions, each with the text's tokens up to it."""


_POSITION_FIELDS = ("position", "n_raw_tokens")


@dataclass(frozen=True, kw_only=True)
class ImportedLabel:
    """One teacher's raw description of the text with this hash.

    Example:
        ImportedLabel(line=17, text_hash="9f86d0...", position=None, teacher="teacher_a",
        raw="1. **Use memoization** ...")
    """

    line: int
    text_hash: str
    position: int | None
    """The text is described up to it; None: the whole text is."""
    teacher: str
    raw: str


@dataclass(frozen=True, kw_only=True)
class RefusedLabel:
    """A row, or a label of a row, that is not taken.

    Example:
        RefusedLabel(line=18, doc_id="A01_code_001", reason="text is not in the corpus")
    """

    line: int
    doc_id: str
    reason: str


def read_labels(
    path: Path,
    hashes_by_document: Mapping[str, set[str]],
    positions: Positions,
    *,
    of_whole_texts: bool,
) -> Iterator[ImportedLabel | RefusedLabel]:
    """Every label of a JSONL file, or its refusal.

    Rows hold `text`, `messages` or `text_hash`, and `teacher` with `label`, or `labels` {teacher:
    label}.
    `hashes_by_document`: doc_id -> hashes of the document's texts in the corpus; a row that names a
    document must carry a text of that document. Rows may say up to where they describe the text, by
    `position`, by `n_raw_tokens` or by both. Where labels are `of_whole_texts`, a row needs neither
    and may only name the end; else it must name a captured position.
    """
    require(
        path.is_file(),
        "label.import_path",
        str(path),
        "a JSONL file",
        "Correct --label.import-path.",
    )
    require_json_lines(path, "label.import_path")
    in_corpus: set[str] = set().union(*hashes_by_document.values())
    seen: set[tuple[str, int | None, str]] = set()
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = _parse(raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw)
                digest = _matching_hash(row, in_corpus, hashes_by_document)
                position = _captured_position(row, digest, positions, of_whole_texts)
                labels = _labels_of(row)
            except ValueError as reason:
                yield RefusedLabel(line=line, doc_id=_doc_id(raw), reason=str(reason))
                continue
            for teacher, label in labels.items():
                reason = _fault_of(teacher, label)
                if reason is None and (digest, position, teacher) in seen:
                    reason = "label is there twice"
                if reason is not None:
                    doc_id = str(row.get("doc_id", ""))
                    yield RefusedLabel(line=line, doc_id=doc_id, reason=reason)
                    continue
                seen.add((digest, position, teacher))
                yield ImportedLabel(
                    line=line, text_hash=digest, position=position, teacher=teacher, raw=label
                )


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object in UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object in UTF-8")
    return row


def _matching_hash(
    row: dict[str, Any], in_corpus: set[str], hashes_by_document: Mapping[str, set[str]]
) -> str:
    text, digest = row.get("text"), row.get("text_hash")
    if text is None and isinstance(row.get(MESSAGES_FIELD), list):
        text = _joined(row[MESSAGES_FIELD])
    if isinstance(text, str):
        try:
            actual = text_hash(without_marks(text))
        except UnicodeEncodeError:
            raise ValueError("text is not valid Unicode") from None
        if digest is not None and digest != actual:
            raise ValueError("text_hash is not the hash of text")
        digest = actual
    if not isinstance(digest, str):
        raise ValueError("neither text nor text_hash")
    document = row.get("doc_id")
    if digest not in hashes_by_document.get(str(document), in_corpus):
        raise ValueError(
            "text differs from the document's in the corpus"
            if str(document) in hashes_by_document
            else "text is not in the corpus"
        )
    if digest not in in_corpus:
        raise ValueError("text is not in the corpus")
    return digest


def _joined(messages: list[Any]) -> str:
    """The plain text of a conversation, as the corpus has it."""
    try:
        return join_turns(turns_of_field(messages, sys.maxsize))
    except BadRow as bad:
        raise ValueError(str(bad)) from None


def _captured_position(
    row: Mapping[str, Any], digest: str, positions: Positions, of_whole_texts: bool
) -> int | None:
    """The captured position that a row names; None for a label of the whole text."""
    named = {name: row[name] for name in _POSITION_FIELDS if row.get(name) is not None}
    if not all(type(value) is int for value in named.values()):
        raise ValueError(f"{' or '.join(named)} is no whole number")
    if not named and of_whole_texts:
        return None
    if not named:
        raise ValueError("neither position nor n_raw_tokens, and the run captures inside texts")
    for position, n_raw_tokens in positions(digest).items():
        found = dict(zip(_POSITION_FIELDS, (position, n_raw_tokens), strict=True))
        if named.items() <= found.items():
            return None if of_whole_texts else position
    raise ValueError(f"no activation is captured at its {' and '.join(named)}")


def _labels_of(row: dict[str, Any]) -> dict[str, Any]:
    """Teacher -> label as the row has it, good or bad; raises ValueError for a row without any."""
    labels = row.get("labels")
    if labels is None and isinstance(row.get("teacher"), str) and "label" in row:
        labels = {row["teacher"]: row["label"]}
    if not isinstance(labels, dict) or not labels:
        raise ValueError("neither labels nor teacher and label")
    return labels


def _fault_of(teacher: str, label: Any) -> str | None:
    """Why a label is not taken, with the teacher's name; None for a good one."""
    if not teacher:
        return "label without a teacher's name"
    if not isinstance(label, str):
        return f"label of {teacher!a} is {'null' if label is None else 'no string'}"
    try:
        (teacher + label).encode()
    except UnicodeEncodeError:
        return f"label of {teacher!a} is not valid Unicode: it holds half a character"
    return None


def _doc_id(raw: bytes) -> str:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    return str(row.get("doc_id", "")) if isinstance(row, dict) else ""
