"""Content families of a corpus: which documents share text, the split each takes, and what is left.

Knows chunks and document ids. Protects the rule that a family takes one split, by its id alone; a
document that shares text with no other keeps the split of its own id.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nla_ray.run.identity import split_of
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import Chunk
from nla_ray.text.joining import join_documents
from nla_ray.text.shingles import shingle_hashes

COVERED = 1 / 2
"""A held-out text with this share of its shingles in train texts is no test of anything."""


@dataclass(frozen=True, kw_only=True)
class SourceTexts:
    """The chunks that a source gives, and what is known of their documents besides.

    Example: SourceTexts(chunks=[...], groups={"ticket-17": "customer-4"})
    """

    chunks: list[Chunk]
    fingerprints: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Document -> the sample of its shingles, also of what became no chunk."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Document -> the family that the user says it is of."""


def chunk_shingles(chunks: Sequence[Chunk]) -> list[np.ndarray]:
    """The distinct shingles of every chunk."""
    return [np.unique(hashes) for hashes in shingle_hashes([chunk.text for chunk in chunks])]


def family_ids(
    texts: SourceTexts, shingles: Sequence[np.ndarray], config: CorpusConfig
) -> dict[str, str]:
    """doc_id -> family id, of every document that is no family by itself.

    A family is named after its first document by name, or `group/...` after the user's group. What
    a user has grouped is compared with nothing. `shingles`: of every chunk.
    """
    if not config.families:
        return {}
    ids = sorted({chunk.doc_id for chunk in texts.chunks} - set(texts.groups))
    number_of = {doc_id: number for number, doc_id in enumerate(ids)}
    rows = [row for row, chunk in enumerate(texts.chunks) if chunk.doc_id in number_of]
    every = np.arange(len(ids))
    whole = [texts.fingerprints.get(doc_id, np.empty(0, np.uint64)) for doc_id in ids]
    joined = join_documents(every, every, whole)
    owners = np.array([number_of[texts.chunks[row].doc_id] for row in rows], dtype=np.int64)
    joined = join_documents(joined, owners, [shingles[row] for row in rows])
    members: dict[int, list[str]] = {}
    for doc_id, first in zip(ids, joined.tolist(), strict=True):
        members.setdefault(first, []).append(doc_id)
    families = {doc_id: f"group/{group}" for doc_id, group in texts.groups.items()}
    for family in members.values():
        if len(family) > 1:
            families |= dict.fromkeys(family, _representative(family, config))
    return families


def _representative(family: Sequence[str], config: CorpusConfig) -> str:
    """The member that names a family, and whose split is the family's.

    The embedded base was pretrained on documents whose own split is train: a family that holds such
    a document may not be held out.
    """
    if config.path is not None:
        return min(family)
    return min(family, key=lambda doc_id: (split_of(doc_id, config.test_share) != "train", doc_id))


def with_family_splits(
    chunks: Sequence[Chunk], families: Mapping[str, str], config: CorpusConfig
) -> list[Chunk]:
    """The chunks, each in the split of its family."""
    split = {family: split_of(family, config.test_share) for family in set(families.values())}
    return [
        dataclasses.replace(chunk, split=split[families[chunk.doc_id]])
        if chunk.doc_id in families
        else chunk
        for chunk in chunks
    ]


def describe_families(
    chunks: Sequence[Chunk], shingles: Sequence[np.ndarray], families: Mapping[str, str]
) -> dict[str, Any]:
    """Counts for the manifest.

    `held_out_in_train`: by split, the chunks of which COVERED of the shingles are in train chunks.
    `shingles`: of every chunk.
    """
    documents = {chunk.doc_id for chunk in chunks}
    sizes = Counter(families[doc_id] for doc_id in documents & set(families))
    joined = [size for size in sizes.values() if size > 1]
    splits = np.array([chunk.split for chunk in chunks])
    in_train = _covered(shingles, splits == "train") >= COVERED
    return {
        "num_families": len(documents - set(families)) + len(sizes),
        "joined_documents": sum(joined),
        "joined_families": len(joined),
        "largest_family": max(joined, default=1),
        "held_out_in_train": {
            split: int((in_train & (splits == split)).sum()) for split in ("validation", "test")
        },
    }


def _covered(shingles: Sequence[np.ndarray], is_train: np.ndarray) -> np.ndarray:
    """Of every chunk the share of its shingles that are in chunks of train: [chunks]; 0 of none."""
    every = np.concatenate(shingles)
    chunk = np.repeat(np.arange(len(shingles)), [len(hashes) for hashes in shingles])
    found = np.isin(every, every[is_train[chunk]])
    sizes = np.bincount(chunk, minlength=len(shingles))
    return np.bincount(chunk, weights=found, minlength=len(shingles)) / np.maximum(1, sizes)
