"""Word shingles of texts as hashes: every eight words that follow each other.

Knows texts and nothing else. Case, punctuation, white space and the values of digits do not count.
Protects the rule that equal words give equal hashes, whatever the batch or the machine.

Source: Broder 1997 (shingles); Schleimer, Wilkerson, Aiken 2003 (winnowing).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

SHINGLE_WORDS = 8
WINDOW_SHINGLES = 8
"""Of so many shingles in a row a fingerprint holds one: fifteen common words always meet."""
_BATCH_BYTES = 1 << 22
"""Bytes of text that are hashed at once."""
_BASE = 0x9E3779B97F4A7C15
"""Of the polynomial that hashes a run of words; odd, so that it has an inverse modulo 2^64."""

_NO_WORD = re.compile(r"\W+")
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff])")
"""Letters of scripts that write no spaces (Thai, Lao, Burmese, Khmer, Chinese, Japanese): each
counts as a word."""
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_SPACE = 32


def shingle_hashes(texts: Sequence[str]) -> list[np.ndarray]:
    """For each text uint64 [shingles]: the hashes of its shingles in their order, with repeats.

    A text of fewer than eight words is one shingle; a text without a word has none.

    >>> first, second = shingle_hashes(["One, two: three!", "ONE two three"])
    >>> first == second
    array([ True])
    """
    hashes: list[np.ndarray] = []
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(_normalise(text))
        size += len(batch[-1])
        if size >= _BATCH_BYTES:
            hashes += _batch_hashes(batch)
            batch, size = [], 0
    return hashes + _batch_hashes(batch)


def fingerprint(shingles: np.ndarray) -> np.ndarray:
    """A sorted sample of a text's shingles in their order: the least hash of every eight in a row.

    About two of nine are kept. Texts that share fifteen words in a row, and so eight shingles,
    share one of the sample; what share of the sample is common estimates the common share of all.
    """
    if len(shingles) < WINDOW_SHINGLES:
        return shingles.min(keepdims=True) if len(shingles) else shingles
    windows = np.lib.stride_tricks.sliding_window_view(shingles, WINDOW_SHINGLES)
    return np.unique(windows.min(axis=1))


def _normalise(text: str) -> bytes:
    spaced = _UNSPACED.sub(r" \1 ", text.lower())
    return _NO_WORD.sub(" ", spaced).strip().encode("utf-8", "replace").translate(_DIGITS)


def _batch_hashes(batch: list[bytes]) -> list[np.ndarray]:
    """Of texts whose words are separated by single spaces."""
    if not batch:
        return []
    characters = np.frombuffer(b" ".join(batch), dtype=np.uint8)
    lengths = np.array([len(text) for text in batch])
    offsets = np.cumsum(lengths + 1) - lengths - 1
    is_letter = np.r_[False, characters != _SPACE, False]
    starts = np.flatnonzero(is_letter[1:] & ~is_letter[:-1])
    ends = np.flatnonzero(~is_letter[1:] & is_letter[:-1])
    first_word = np.searchsorted(starts, offsets)
    num_words = np.diff(np.r_[first_word, len(starts)])
    num_shingles = np.where(num_words > 0, np.maximum(num_words - SHINGLE_WORDS, 0) + 1, 0)
    begin = np.repeat(first_word, num_shingles) + counting(num_shingles)
    last = begin + np.repeat(np.minimum(num_words, SHINGLE_WORDS), num_shingles) - 1
    hashes = _span_hashes(characters, starts[begin], ends[last])
    return np.split(hashes, np.cumsum(num_shingles)[:-1])


def counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... anew for each length.

    >>> counting(np.array([2, 0, 3]))
    array([0, 1, 0, 1, 2])
    """
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _span_hashes(characters: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Hash of characters[begin:end] for every pair: a polynomial in _BASE, modulo 2^64, mixed."""
    steps = len(characters)
    powers = np.cumprod(np.r_[np.uint64(1), np.full(steps, _BASE, dtype=np.uint64)])
    inverse = pow(_BASE, -1, 1 << 64)
    inverses = np.cumprod(np.r_[np.uint64(1), np.full(steps, inverse, dtype=np.uint64)])
    values = (characters.astype(np.uint64) + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)
    values ^= values >> np.uint64(29)
    sums = np.r_[np.uint64(0), np.cumsum(values * powers[:-1])]
    hashes = (sums[end] - sums[begin]) * inverses[begin]
    for _ in range(2):
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(_BASE)
    return hashes ^ (hashes >> np.uint64(29))
