"""Exact and near duplicates, found with one-permutation MinHash and banded hashing.

Knows texts and nothing else: the caller orders them, and the first text of each cluster is the one
kept. The rule it protects: no two texts that survive share more than `threshold` of their shingles,
so none can sit on both sides of a split.

Source: Li, Owen, Zhang 2012 (one permutation hashing); Shrivastava, Li 2014 (rotation
densification).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

NUM_BINS = 128
NUM_BANDS = 32
SHINGLE_BYTES = 8
"""Code repeats short words everywhere; eight bytes are about one and a half identifiers."""
BATCH_BYTES = 1 << 22
"""Bytes of text that are hashed at once."""
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
MULTIPLIER = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, Knuth's multiplicative hash."""

_SPACE = re.compile(rb"\s+")
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)


def first_of_clusters(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Boolean mask over signatures [texts, NUM_BINS]: True for the texts to keep.

    Of texts that nearly repeat each other the first is kept. `threshold` is the estimated Jaccard
    similarity of shingle sets; case, the digits' values and white space are ignored.
    """
    keep = np.ones(len(signatures), dtype=bool)
    while True:
        alive = np.flatnonzero(keep)
        if len(alive) < 2:
            return keep
        removed = alive[_later_members(signatures[alive], threshold)]
        if len(removed) == 0:
            return keep
        keep[removed] = False


def minhash_signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 signatures [texts, NUM_BINS]; equal entries estimate the Jaccard similarity."""
    signatures = np.empty((len(texts), NUM_BINS), dtype=np.uint32)
    batch: list[bytes] = []
    start = size = 0
    for index, text in enumerate(texts):
        batch.append(_normalise(text))
        size += len(batch[-1])
        if size >= BATCH_BYTES or index == len(texts) - 1:
            signatures[start : index + 1] = _batch_signatures(batch)
            batch, start, size = [], index + 1, 0
    return signatures


def jaccard_similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of shingle sets: the share of equal entries, last axis.

    >>> jaccard_similarity(np.array([1, 2, 3, 4]), np.array([[1, 2, 3, 9], [5, 6, 7, 8]]))
    array([0.75, 0.  ])
    """
    return (left == right).mean(axis=-1)


def has_twin(signatures: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    """Boolean mask over `signatures`: True where a candidate is at least as similar as `threshold`.

    Both are signatures [texts, NUM_BINS].
    """
    closest = [jaccard_similarity(row, candidates).max(initial=0.0) for row in signatures]
    return np.array(closest) >= threshold


def _normalise(text: str) -> bytes:
    squeezed = _SPACE.sub(b" ", text.lower().encode("utf-8", "replace")).strip()
    return squeezed.translate(_DIGITS).ljust(SHINGLE_BYTES)


def _batch_signatures(batch: list[bytes]) -> np.ndarray:
    lengths = np.array([len(item) for item in batch])
    owner = np.repeat(np.arange(len(batch)), lengths)
    left_in_text = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    characters = np.frombuffer(b"".join(batch), dtype=np.uint8).astype(np.uint64)
    hashes = _window_hashes(characters)
    valid = left_in_text[: len(hashes)] >= SHINGLE_BYTES
    hashes, owner = hashes[valid], owner[: len(valid)][valid]
    bins = (hashes >> np.uint64(57)).astype(np.int64)
    values = (hashes >> np.uint64(20)) & np.uint64(0x7FFFFFFF)
    table = np.full(len(batch) * NUM_BINS, EMPTY, dtype=np.uint64)
    np.minimum.at(table, owner * NUM_BINS + bins, values)
    return _densify(table.reshape(len(batch), NUM_BINS)).astype(np.uint32)


def _window_hashes(characters: np.ndarray) -> np.ndarray:
    """Hash of each window of SHINGLE_BYTES bytes: the eight bytes as one integer, mixed twice."""
    count = len(characters) - SHINGLE_BYTES + 1
    packed = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_BYTES):
        packed = (packed << np.uint64(8)) | characters[offset : offset + count]
    packed *= np.uint64(MULTIPLIER)
    packed ^= packed >> np.uint64(32)
    packed *= np.uint64(MULTIPLIER)
    return packed


def _densify(table: np.ndarray) -> np.ndarray:
    """Fill each empty bin from the next filled one to its right, marked with the distance."""
    table = table.copy()
    step = np.uint64(0x1F123BB5)
    while (empty := table == EMPTY).any():
        borrowed = np.roll(table, -1, axis=1)
        fresh = empty & (borrowed != EMPTY)
        table[fresh] = (borrowed[fresh] + step) & np.uint64(0xFFFFFFFF)
    return table


def _later_members(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Rows similar to an earlier row, among the pairs that share a band."""
    rows = NUM_BINS // NUM_BANDS
    removed = np.zeros(len(signatures), dtype=bool)
    for band in range(NUM_BANDS):
        keys = (
            np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
            .view(f"V{4 * rows}")
            .ravel()
        )
        _, inverse = np.unique(keys, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        group = inverse[order]
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        first = order[np.repeat(starts, np.diff(np.r_[starts, len(order)]))]
        for earlier, later in ((first, order), (order[:-1], order[1:])):
            same = (inverse[earlier] == inverse[later]) & (earlier < later)
            earlier, later = earlier[same], later[same]
            close = jaccard_similarity(signatures[earlier], signatures[later]) >= threshold
            removed[later[close]] = True
    return removed
