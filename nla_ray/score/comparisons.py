"""What every row is compared with: wrong rows of other families, fixed once, and ranks among them.

A `Comparisons` is drawn by seed and shared by every verbalizer and scorer, so that all of them take
the same test. Pure arithmetic on vectors and document names; it knows neither text nor files.
Protects two rules: a wrong row shares no text with the right one (it belongs to another family,
the document itself where it shares text with none); a tie counts against the right row, so
that a constant reconstruction earns nothing.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.run.identity import seed_of

NUM_OTHERS = 9
"""Wrong rows beside the right one in the 10-way choice."""
MOST_OTHERS = 99
"""Wrong rows drawn for the largest choice; fewer where there are fewer."""
_BLOCK_ROWS = 1_024
_COMPARED_VALUES = 8_192
"""Activations compared at once."""


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The rows that are compared, and what each is compared with (as rows of the pool).

    Example, four rows of two documents: rows=[0, 1, 2, 3], wrong=[2, 3, 0, 1],
    document_others=[[1], [0], [3], [2]].
    """

    pool: Float[Tensor, "pool d_model"]
    """v, raw: the rows compared, and what they are compared with."""
    rows: Int[Tensor, " rows"]
    """Which rows of the pool are compared."""
    mean: Float[Tensor, " d_model"]
    """mu over train."""
    wrong: Int[Tensor, " rows"]
    """The wrong row of the 2-way choice and of the garbage cosine."""
    others: Int[Tensor, "rows others"]
    """Random wrong rows, 99 or as many as there are; the first k - 1 make the k-way choice."""
    hard_others: Int[Tensor, "rows hard"]
    """The wrong rows of the hard 10-way choice."""
    document_others: Int[Tensor, "rows most"]
    """Other rows of the same document, filled up with -1."""

    @classmethod
    def draw(
        cls,
        originals: Float[Tensor, "rows d_model"],
        doc_ids: Sequence[str],
        mean: Float[Tensor, " d_model"],
        seed: int,
        domains: Sequence[str] | None = None,
        family_ids: Sequence[str] | None = None,
    ) -> Comparisons:
        """Seeded pairs and choices; every wrong row belongs to another family.

        Without `domains` all rows are of one; without `family_ids` documents are families. Raises
        ValueError for too few families.
        """
        originals, mean = originals.float(), mean.float()
        domains, families = domains or [""] * len(doc_ids), family_ids or doc_ids
        outside = len(families) - int(_numbered(families).bincount().max()) if families else 0
        return cls(
            pool=originals,
            rows=torch.arange(len(originals)),
            mean=mean,
            wrong=derangement(families, seed),
            others=other_rows(families, max(NUM_OTHERS, min(MOST_OTHERS, outside)), seed + 1),
            hard_others=hard_rows(originals, families, domains, mean, NUM_OTHERS),
            document_others=document_rows(doc_ids),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, indices: Tensor) -> Comparisons:
        """The same comparisons for some of the rows (index into them), against the whole pool."""
        return dataclasses.replace(
            self,
            rows=self.rows[indices],
            wrong=self.wrong[indices],
            others=self.others[indices],
            hard_others=self.hard_others[indices],
            document_others=self.document_others[indices],
        )

    @cached_property
    def originals(self) -> Float[Tensor, "rows d_model"]:
        """v of the rows compared, raw."""
        return self.pool[self.rows]

    @cached_property
    def centred(self) -> Float[Tensor, "pool d_model"]:
        """c(v) / |c(v)| of the pool."""
        return vectors.direction(vectors.centre(self.pool, self.mean))


def derangement(family_ids: Sequence[str], seed: int) -> Int[Tensor, " rows"]:
    """A permutation that gives every row a row of another family.

    Rows are laid out family by family in random order and shifted by a random amount that is at
    least the longest family, on either side. Raises ValueError when one family has more than
    half of the rows.
    """
    families = _numbered(family_ids)
    rows, longest = len(families), int(families.bincount().max()) if len(families) else 0
    if rows < 2 or 2 * longest > rows:
        raise ValueError(
            f"derangement: got {rows} rows with {longest} of one family, expected at most half of"
            " the rows from one. Use more documents; those that share text are one family."
        )
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randperm(int(families.max()) + 1, generator=generator)[families]
    order = torch.argsort(turns * rows + torch.randperm(rows, generator=generator))
    shift = int(torch.randint(longest, rows - longest + 1, (1,), generator=generator))
    result = torch.empty(rows, dtype=torch.int64)
    result[order] = order.roll(shift)
    return result


def family_pairs(family_ids: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """`count` seeded pairs of rows of two families each: all first rows, and all second ones.

    Each pass over the rows pairs every row once, as the first and as the second. Raises ValueError
    when one family has more than half of the rows.
    """
    firsts: list[int] = []
    seconds: list[int] = []
    while len(firsts) < count:
        partners = derangement(family_ids, seed + len(firsts)).tolist()
        draw = random.Random(seed_of(seed, "differences", str(len(firsts))))
        chosen = draw.sample(range(len(partners)), min(len(partners), count - len(firsts)))
        firsts += chosen
        seconds += [partners[number] for number in chosen]
    return firsts, seconds


def other_rows(
    family_ids: Sequence[str], num_others: int, seed: int
) -> Int[Tensor, "rows {num_others}"]:
    """For every row distinct rows of other families, uniformly at random.

    Raises ValueError when a row has fewer rows of other families than that.
    """
    families = _numbered(family_ids)
    rows, longest = len(families), int(families.bincount().max()) if len(families) else 0
    if rows - longest < num_others:
        raise ValueError(
            f"wrong rows: got {rows - longest} rows outside the longest family, expected at least"
            f" {num_others}. Evaluate more documents; those that share text are one family."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for block in families.split(_BLOCK_ROWS):
        keys = torch.rand(len(block), rows, generator=generator)
        keys[block[:, None] == families[None, :]] = -1.0
        chosen.append(keys.topk(num_others, dim=1).indices)
    return torch.cat(chosen)


def rows_of_neither(
    family_ids: Sequence[str], firsts: Sequence[int], seconds: Sequence[int], num: int, seed: int
) -> Int[Tensor, "pairs {num}"]:
    """For every pair of rows distinct rows of neither one's family, uniformly at random.

    Raises ValueError when a pair has fewer of them.
    """
    families = _numbered(family_ids)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for block in torch.tensor([firsts, seconds]).split(_BLOCK_ROWS, dim=1):
        keys = torch.rand(block.shape[1], len(families), generator=generator)
        for ends in block:
            keys[families[ends, None] == families[None, :]] = -1.0
        fewest = int((keys >= 0).sum(1).min())
        if fewest < num:
            raise ValueError(
                f"other rows of a pair: got {fewest} outside its two families, expected at least"
                f" {num}. Use more documents; those that share text are one family."
            )
        chosen.append(keys.topk(num, dim=1).indices)
    return torch.cat(chosen)


def hard_rows(
    originals: Float[Tensor, "rows d_model"],
    family_ids: Sequence[str],
    domains: Sequence[str],
    mean: Float[Tensor, " d_model"],
    num_others: int,
) -> Int[Tensor, "rows {num_others}"]:
    """For every row the nearest rows of its domain in other families, by centred cosine.

    A domain with too few is filled up with the nearest rows of other domains.
    """
    families, domain = _numbered(family_ids), _numbered(domains)
    centred = vectors.direction(vectors.centre(originals, mean))
    chosen = []
    for rows in torch.arange(len(families)).split(_BLOCK_ROWS):
        nearness = centred[rows] @ centred.T
        nearness -= 4.0 * (domain[rows, None] != domain[None, :])  # two cosines differ by 2 at most
        nearness[families[rows, None] == families[None, :]] = -torch.inf
        chosen.append(nearness.topk(num_others, dim=1).indices)
    return torch.cat(chosen)


def document_rows(doc_ids: Sequence[str]) -> Int[Tensor, "rows most"]:
    """For every row the other rows of its document, in order, filled up with -1.

    >>> document_rows(["a", "b", "a"]).tolist()
    [[2], [-1], [0]]
    """
    rows_of: dict[str, list[int]] = {}
    for row, doc_id in enumerate(doc_ids):
        rows_of.setdefault(doc_id, []).append(row)
    most = max(map(len, rows_of.values()), default=1) - 1
    result = torch.full((len(doc_ids), most), -1)
    for row, doc_id in enumerate(doc_ids):
        siblings = [sibling for sibling in rows_of[doc_id] if sibling != row]
        result[row, : len(siblings)] = torch.tensor(siblings, dtype=torch.int64)
    return result


def ranks(
    reconstructions: Float[Tensor, "rows d_model"],
    comparisons: Comparisons,
    others: Int[Tensor, "rows k"],
) -> Int[Tensor, " rows"]:
    """Rank of the right row among itself and `others` by centred cosine; 1 is best."""
    return 1 + beaten_by(reconstructions, comparisons, others).sum(1)


def beaten_by(
    reconstructions: Float[Tensor, "rows d_model"],
    comparisons: Comparisons,
    others: Int[Tensor, "rows k"],
) -> Bool[Tensor, "rows k"]:
    """Whether each of `others` fits at least as well as the right row, by centred cosine.

    A tie counts against the right row; -1 stands for no row and never fits.
    """
    centred = vectors.direction(vectors.centre(reconstructions, comparisons.mean))
    block_rows = _COMPARED_VALUES // (1 + others.shape[1]) or 1
    blocks = []
    for rows in torch.arange(len(comparisons)).split(block_rows):
        candidates = torch.cat([comparisons.rows[rows, None], others[rows]], dim=1)
        scores = torch.einsum("rd,rkd->rk", centred[rows], comparisons.centred[candidates])
        blocks.append((scores[:, 1:] >= scores[:, :1]) & (others[rows] >= 0))
    return torch.cat(blocks)


def nearest_rows(
    queries: Float[Tensor, "queries d_model"],
    candidates: Float[Tensor, "candidates d_model"],
    mean: Float[Tensor, " d_model"],
) -> Int[Tensor, " queries"]:
    """Index of the candidate with the highest centred cosine to each query.

    Candidates are read block by block, so that a memory-mapped table of any size is never loaded
    whole.
    """
    centred = vectors.direction(vectors.centre(queries, mean))
    best = torch.full((len(queries),), -torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(candidates), _BLOCK_ROWS):
        block = vectors.direction(vectors.centre(candidates[start : start + _BLOCK_ROWS], mean))
        scores, columns = (centred @ block.T).max(1)
        better = scores > best
        best[better], index[better] = scores[better], columns[better] + start
    return index


def _numbered(names: Sequence[str]) -> Int[Tensor, " rows"]:
    """Each row's document (or domain) as a number, in order of the names."""
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)
