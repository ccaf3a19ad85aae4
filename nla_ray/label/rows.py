"""The rows of the label table: every teacher's label of a subject, cleaned, and one of them drawn.

Knows raw labels; who wrote them and where rows go is elsewhere. Protects the rule that the draw
depends on the subject's id and the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from nla_ray.label.cleaner import clean_label
from nla_ray.label.subjects import Subject, subject_id
from nla_ray.run.identity import seed_of
from nla_ray.settings.config import LabelConfig
from nla_ray.text.chunks import TEXT_FIELDS

LABEL_SCHEMA = pa.schema(
    [
        *TEXT_FIELDS,
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("drawn", pa.bool_(), nullable=False),
    ]
)
"""One teacher's description of one text: as written (`raw`), cleaned to bullets (`label`), and
whether this label was drawn for the text (`drawn`)."""

POSITION_SCHEMA = pa.schema(
    [
        *LABEL_SCHEMA,
        pa.field("position", pa.int32(), nullable=False),
        pa.field("n_raw_tokens", pa.int32(), nullable=False),
    ]
)
"""One teacher's description of one text up to a position: see `Subject`."""

LabelRow = dict[str, Any]
"""A row of LABEL_SCHEMA or POSITION_SCHEMA."""


def label_rows(
    subject: Subject,
    raw_labels: Sequence[tuple[str, str]],
    config: LabelConfig,
    clean: Callable[[str, int], str] = clean_label,
) -> list[LabelRow]:
    """The rows of one subject, sorted by teacher; exactly one is drawn when any label is left.

    `raw_labels`: (teacher, raw label). `clean`: raw label and most words -> bullets. A label
    that cleaning leaves empty has no row.
    """
    cleaned: list[LabelRow] = []
    for teacher, raw in sorted(raw_labels):
        if label := clean(raw, config.max_words):
            cleaned.append({"teacher": teacher, "raw": raw, "label": label})
    name = subject_id(subject.text["text_id"], subject.position)
    drawn = seed_of(config.seed, "style", name) % max(1, len(cleaned))
    identity = {field.name: subject.text[field.name] for field in TEXT_FIELDS}
    if subject.position is not None:
        identity |= {"position": subject.position, "n_raw_tokens": subject.n_raw_tokens}
    return [{**identity, **row, "drawn": index == drawn} for index, row in enumerate(cleaned)]


def subject_of(row: LabelRow) -> str:
    """The id of the subject that a row is about."""
    return subject_id(row["text_id"], row.get("position"))
