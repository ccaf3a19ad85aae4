"""Rows that cross a stage boundary, with their Arrow schemas; and the split, which is a function of
the document.

Stages meet only through Parquet files of these schemas. Dimension word: d_model = width of the
residual stream.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
VALIDATION_SHARE = 0.06
TEST_SHARE = 0.10
"""Of a large corpus; a small one needs more to prove anything, see `corpus.test_share`."""

_TEXT_FIELDS = [
    pa.field("text_id", pa.string(), nullable=False),
    pa.field("doc_id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("domain", pa.string(), nullable=False),
]

CHUNK_SCHEMA = pa.schema(
    [
        *_TEXT_FIELDS,
        pa.field("chunk_index", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""One text: `text_id` = `{doc_id}#{chunk_index}`; rows are sorted by text_id."""

LABEL_SCHEMA = pa.schema(
    [
        *_TEXT_FIELDS,
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("drawn", pa.bool_(), nullable=False),
    ]
)
"""One teacher's description of one text: as written, cleaned to bullets, and whether this style was
drawn for the text."""


def activation_schema(d_model: int) -> pa.Schema:
    """One residual-stream vector, raw float32, never normalised; `activation_id` =
    `{text_id}@{layer}:{position}`.

    `position` is the 0-based index of the token in the chat-formatted prompt, `token` its id.
    """
    return pa.schema(
        [
            pa.field("activation_id", pa.string(), nullable=False),
            *_TEXT_FIELDS,
            pa.field("text", pa.string(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token", pa.int32(), nullable=False),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("activation", pa.list_(pa.float32(), d_model), nullable=False),
        ]
    )


def activation_id(text_id: str, layer: int, position: int) -> str:
    """The identity of one captured vector."""
    return f"{text_id}@{layer}:{position}"


def split_of(doc_id: str, test_share: float = TEST_SHARE) -> Split:
    """The split of a document: a hash of its id alone, so that nothing derived from it can change
    sides.

    A larger test share takes in every test document of a smaller one.
    """
    share = int(hashlib.sha256(doc_id.encode()).hexdigest()[:8], 16) / 2**32
    train_share = 1 - test_share - VALIDATION_SHARE
    if share < train_share:
        return "train"
    return "validation" if share < train_share + VALIDATION_SHARE else "test"


def document_half(doc_id: str) -> Literal["even", "odd"]:
    """Which scorer may learn from a document; independent of its split."""
    return (
        "even"
        if int(hashlib.sha256(b"half:" + doc_id.encode()).hexdigest()[:8], 16) % 2 == 0
        else "odd"
    )


def seed_of(seed: int, *keys: str) -> int:
    """A 63-bit seed keyed by record, so that no result depends on sharding or on the number of
    workers."""
    return (
        int.from_bytes(hashlib.sha256(":".join((str(seed), *keys)).encode()).digest()[:8], "big")
        >> 1
    )


def text_hash(text: str) -> str:
    """SHA-256 of a text, hex: how labels made elsewhere prove which text they describe."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled description with its tokens and log-probabilities.

    Example:
        Rollout(row=17, token_ids=[220, 5, 9, 2], log_probs=[-0.1, -1.2, -0.3, -0.0], text="- Python
        test{closing tag}",
                finished=True, weight_version=12)
    """

    row: int
    """Row of the activation bank it describes."""
    token_ids: list[int]
    """Sampled ids, end-of-sequence included when it was sampled; each below the vocabulary size."""
    log_probs: list[float]
    """Log-probability of each sampled id under the (temperature-scaled) sampling distribution."""
    text: str
    """Decoded text without special tokens: `{description}{closing tag}` when it is closed."""
    finished: bool
    """False: it ran into the token limit."""
    weight_version: int
    """Version of the adapter that sampled it."""
