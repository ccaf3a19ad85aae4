"""What an id alone decides: a document's split and half, and every seed drawn for it.

Documents that share text go by the id of their family. It protects two rules: nothing that is
derived from a document changes sides, and no result depends on sharding or on the number of
workers.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
VALIDATION_SHARE = 0.06
"""Share of the documents that checkpoints are chosen on."""
TEST_SHARE = 0.10
"""Share that a report is made of; a small corpus needs more, see `corpus.test_share`."""


def split_of(doc_id: str, test_share: float = TEST_SHARE) -> Split:
    """The split of a document or of a family, by a hash of its id alone.

    A larger test share holds every test document of a smaller share.
    """
    share = int(_digest(doc_id).hex()[:8], 16) / 2**32
    train_share = 1 - test_share - VALIDATION_SHARE
    if share < train_share:
        return "train"
    return "validation" if share < train_share + VALIDATION_SHARE else "test"


def document_half(doc_id: str) -> Literal["even", "odd"]:
    """Which scorer may learn from a document or a family; independent of its split."""
    return "odd" if int(_digest(f"half:{doc_id}").hex()[:8], 16) % 2 else "even"


def seed_of(seed: int, *keys: str) -> int:
    """A 63-bit seed for a record that `keys` name."""
    digest = _digest(":".join((str(seed), *keys)))
    return int.from_bytes(digest[:8], "big") >> 1


def text_hash(text: str) -> str:
    """SHA-256 of a text, hex: by it labels made elsewhere prove which text they describe."""
    return _digest(text).hex()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
