"""The rows of the label table: every teacher's label of a text, cleaned, and one of them drawn.

Knows raw labels; who wrote them and where rows go is elsewhere. Protects the rule that the draw
depends on the text's id and the seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from nla_ray.label.cleaner import clean_label
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

LabelRow = dict[str, Any]
"""A row of LABEL_SCHEMA."""


def label_rows(
    text: Mapping[str, Any], raw_labels: Sequence[tuple[str, str]], config: LabelConfig
) -> list[LabelRow]:
    """The rows of one text, sorted by teacher; exactly one is drawn when any label is left.

    `text`: a row of CHUNK_SCHEMA. `raw_labels`: (teacher, raw label). A label that cleaning leaves
    empty has no row.
    """
    cleaned: list[LabelRow] = []
    for teacher, raw in sorted(raw_labels):
        if label := clean_label(raw, config.max_words):
            cleaned.append({"teacher": teacher, "raw": raw, "label": label})
    drawn = seed_of(config.seed, "style", text["text_id"]) % max(1, len(cleaned))
    identity = {field.name: text[field.name] for field in TEXT_FIELDS}
    return [{**identity, **row, "drawn": index == drawn} for index, row in enumerate(cleaned)]
