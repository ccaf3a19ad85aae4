"""Which documents a base was pretrained on, where its card says so: the embedded base's does.

Knows the card alone. Protects the rule that no report is about a document its base learned from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

DIGEST_CHARS = 16


def check_never_seen(card: dict[str, Any], doc_ids: Iterable[str]) -> None:
    """Raise ValueError when a model with this card learned from any of these held-out documents."""
    learned = set(card["doc_id_digests"])
    leaked = sorted(doc_id for doc_id in doc_ids if digest(doc_id) in learned)
    if leaked:
        raise ValueError(
            f"lineage: the base model was pretrained on {len(leaked)} of the documents held out:"
            f" {leaked[:3]}, expected none. Leave --corpus.test-share as the preset has it, or"
            " pretrain the base again."
        )


def never_nearly_seen(card: dict[str, Any], doc_ids: Sequence[str]) -> list[int]:
    """Indices of the documents that nearly repeat none that a model with this card learned from."""
    twins = set(card["twin_digests"])
    return [index for index, doc_id in enumerate(doc_ids) if digest(doc_id) not in twins]


def digest(doc_id: str) -> str:
    """Short identity of a document in the card: the first 16 hex digits of its id's SHA-256."""
    return hashlib.sha256(doc_id.encode()).hexdigest()[:DIGEST_CHARS]
