"""A chunk: one text of the corpus, as a record and as a row of its Parquet files."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from nla_ray.run.identity import Split

TEXT_FIELDS = [
    pa.field("text_id", pa.string(), nullable=False),
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("domain", pa.string(), nullable=False),
]
"""What identifies a text in every table about texts."""
CHUNK_SCHEMA = pa.schema(
    [
        *TEXT_FIELDS,
        pa.field("chunk_index", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""One text: `text_id` = `{doc_id}#{chunk_index}`; rows are sorted by text_id."""
CONVERSATION_SCHEMA = pa.schema([*CHUNK_SCHEMA, pa.field("messages", pa.string())])
"""The same where some texts are conversations: null in those that are not."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One text of the corpus, a row of CHUNK_SCHEMA or CONVERSATION_SCHEMA.

    Example:
        Chunk(text_id="licence/numpy/LICENSE#2", doc_id="licence/numpy/LICENSE", split="train",
        domain="licence", chunk_index=2, text="Redistribution and use ...")
    """

    text_id: str
    doc_id: str
    split: Split
    domain: str
    chunk_index: int
    text: str
    messages: str | None = None
    """Of a conversation its turns, as `base.conversation.as_messages` writes them; `text` is then
    what `join_turns` makes of them."""
