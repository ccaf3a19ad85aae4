"""Rows that cross a stage boundary, with their Arrow schemas; and the split, which is a function of
the document.

Stages meet only through Parquet files of these schemas. Dimension word: d_model = width of the
residual stream.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
VALIDATION_SHARE = 0.06
TEST_SHARE = 0.10
"""Of a large corpus; a small one needs more to prove anything, see `corpus.test_share`."""


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
