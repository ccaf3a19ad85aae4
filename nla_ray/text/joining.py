"""Content families: documents that share text, so that no split and no interval takes them apart.

A text belongs to the family that holds much of it: SHARED of its shingles lie in texts of another
family, in all of them together, and not only in the one that is nearest. Near duplicates, windows
of one article and quoted texts join so; a common phrase alone joins nothing. Knows shingles and
numbers of documents; where texts come from is elsewhere. Protects the rule that, when all is
joined, no text has SHARED of its shingles in the texts of other families.

Time is that of sorting the shingles, whatever the number of pairs: 200,000 texts of 60 shingles
took half a minute of a core and 0.8 GB, four times as much as 50,000. To that end texts that very
many families share (a licence, a form) are compared with the first of these, and after
CAREFUL_ROUNDS rounds what is still open is joined with all that it shares a shingle with. Limits:
all shingles are held in memory; of a document its chunks and its beginning are compared, see
`user_corpus`; a translation or a paraphrase shares no shingle. Who knows better gives `group_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nla_ray.text.shingles import counting

SHARED = 1 / 3
"""Windows that overlap by half hold a little less than half of their neighbour's shingles."""
CAREFUL_ROUNDS = 16
_PAIRS = 1 << 22
"""Pairs of a shingle and a family that are counted in one round, about."""
_LEAST_FAMILIES = 16
"""Families of a shingle that are looked at in every case."""
_PART_SHINGLES = 1 << 24
"""Shingles that are sorted at once."""


def join_documents(
    families: np.ndarray, documents: np.ndarray, shingles: Sequence[np.ndarray]
) -> np.ndarray:
    """The families [documents], joined further by what texts share.

    `families`: of every document, the number of its family's first document. `documents` [texts]:
    whose text it is. `shingles`: of every text, distinct hashes.

    >>> one, two, three = np.arange(0, 12), np.arange(8, 20), np.arange(90, 99)
    >>> join_documents(np.arange(3), np.arange(3), [one, two, three]).tolist()
    [0, 0, 2]
    """
    shared = _SharedShingles.of(documents, shingles)
    families = families.copy()
    for number in range(CAREFUL_ROUNDS + 1):
        links = shared.links(families, joins_all=number == CAREFUL_ROUNDS)
        if not len(links):
            break
        families = _united(families, links)
    return families


@dataclass(frozen=True, kw_only=True)
class _SharedShingles:
    """Where shingles occur that texts of several documents hold, sorted by shingle."""

    documents: np.ndarray
    """Of every text: [texts]."""
    needed: np.ndarray
    """Shingles that a text must share with others: [texts]."""
    text: np.ndarray
    """[occurrences]"""
    shingle: np.ndarray
    """Its number, from 0: [occurrences]."""

    @classmethod
    def of(cls, documents: np.ndarray, shingles: Sequence[np.ndarray]) -> _SharedShingles:
        sizes = np.array([len(hashes) for hashes in shingles], dtype=np.int64)
        text_of = np.repeat(np.arange(len(shingles), dtype=np.int32), sizes)
        every = np.concatenate(shingles) if len(shingles) else np.empty(0, np.uint64)
        num_parts = 1 + len(every) // _PART_SHINGLES
        texts, numbers, count = [], [], 0
        for part in range(num_parts):
            chosen = np.flatnonzero(every % np.uint64(num_parts) == part)
            chosen = chosen[np.argsort(every[chosen], kind="stable")]
            text, hashes = text_of[chosen], every[chosen]
            is_new = np.ones(len(hashes), dtype=bool)
            is_new[1:] = hashes[1:] != hashes[:-1]
            starts, number = np.flatnonzero(is_new), np.cumsum(is_new) - 1
            holders = documents[text]
            first = np.minimum.reduceat(holders, starts) if len(starts) else starts
            last = np.maximum.reduceat(holders, starts) if len(starts) else starts
            is_shared = first != last
            texts.append(text[is_shared[number]])
            numbers.append((np.cumsum(is_shared) - 1 + count)[number[is_shared[number]]])
            count += int(is_shared.sum())
        return cls(
            documents=documents,
            needed=np.maximum(1, np.ceil(sizes * SHARED)).astype(np.int64),
            text=np.concatenate(texts),
            shingle=np.concatenate(numbers),
        )

    def links(self, families: np.ndarray, *, joins_all: bool) -> np.ndarray:
        """Pairs of families that are to be joined: [pairs, 2]; none when nothing is open.

        An open text, one of which too much lies outside its family, is joined with every family
        that holds as much of it alone; where none does, with the one that holds most. `joins_all`:
        with every family that holds anything of it.
        """
        own = families[self.documents[self.text]]
        order = np.lexsort((own, self.shingle))
        pairs = np.stack([self.shingle[order], own[order]])
        is_new = np.ones(pairs.shape[1], dtype=bool)
        is_new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
        shingle_of_pair, family_of_pair = pairs[:, is_new]
        num_families = np.bincount(shingle_of_pair)
        starts = np.cumsum(num_families) - num_families
        is_outside = num_families[self.shingle] > 1
        outside = np.bincount(self.text[is_outside], minlength=len(self.needed))
        is_open = outside >= self.needed
        rows = np.flatnonzero(is_outside & is_open[self.text])
        if joins_all:
            held = np.isin(shingle_of_pair, self.shingle[rows])
            others = family_of_pair[held]
            return np.stack([family_of_pair[starts[shingle_of_pair[held]]], others], axis=1)
        most = max(_LEAST_FAMILIES, _PAIRS // max(1, len(rows)))
        count = np.minimum(num_families[self.shingle[rows]], most)
        others = family_of_pair[np.repeat(starts[self.shingle[rows]], count) + counting(count)]
        texts = np.repeat(self.text[rows], count)
        is_other = others != families[self.documents[texts]]
        return self._strongest(families, texts[is_other], others[is_other])

    def _strongest(self, families: np.ndarray, texts: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The links of open texts, whose every shared shingle is a row of texts and others."""
        key, common = np.unique(texts.astype(np.int64) * len(families) + others, return_counts=True)
        texts, others = key // len(families), key % len(families)
        order = np.lexsort((others, -common, texts))
        is_best = np.zeros(len(key), dtype=bool)
        is_best[order[np.diff(texts[order], prepend=-1) > 0]] = True
        chosen = is_best | (common >= self.needed[texts])
        own = families[self.documents[texts[chosen]]]
        return np.unique(np.stack([own, others[chosen]], axis=1), axis=0)


def _united(families: np.ndarray, links: np.ndarray) -> np.ndarray:
    """The families with the linked ones joined under the first document of all."""
    first = np.arange(len(families))

    def first_of(family: int) -> int:
        while first[family] != family:
            first[family] = first[first[family]]
            family = int(first[family])
        return family

    for left, right in links.tolist():
        low, high = sorted((first_of(left), first_of(right)))
        first[high] = low
    return np.array([first_of(family) for family in families.tolist()], dtype=families.dtype)
