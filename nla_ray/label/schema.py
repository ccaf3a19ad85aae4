"""The Arrow schema of a label: one teacher's description of one text."""

from __future__ import annotations

import pyarrow as pa

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
"""One teacher's description of one text: as written, cleaned to bullets, and whether this style was
drawn for the text."""
