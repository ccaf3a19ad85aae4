"""The figures of a verbalizer under a scorer, as values per row; how rows are paired with wrong
ones.

Pure arithmetic on reconstructions and originals: it knows neither text nor files, so training's
monitor may call it too. Intervals are `bootstrap.py`'s. Source: the evaluation definitions;
notation as in `vectors.py`:

    correct_cosine   mean cos(r_i, v_i)                     raw
    garbage_cosine   mean cos(r_i, v_j)                     raw; j a fixed random derangement, other
                     document
    delta            correct - garbage
    top1             share of cos(r_i, v_i) > cos(r_i, v_j) 2-way, chance 0.5
    top1_2way        the same choice by centred cosine: an activation nearer to the mean fits
                     everything better when raw
    centred_cosine   mean cos(c(r_i), c(v_i))
    top1_10way       share of v_i ranked first among 9 others by centred cosine, chance 0.1
    mrr_10way        mean of 1 / rank, chance 0.29
    top1_10way_hard  the same share among the 9 nearest activations of the domain, in other
                     documents
    top1_100way      the same share among 99 others, chance 0.01; the 9 of the 10-way choice are
                     among them
    top1_document    the same share among the other positions of the document, over rows that have
                     some
    fve              1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2

A tie counts against the right row: a constant reconstruction earns nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nla_ray.activation import vectors

NUM_OTHERS = 9
"""Wrong rows beside the right one in the 10-way choice."""
MOST_OTHERS = 99
"""Wrong rows drawn for the largest choice; fewer where there are fewer."""
METRICS = (
    "correct_cosine",
    "garbage_cosine",
    "delta",
    "top1",
    "top1_2way",
    "centred_cosine",
    "top1_10way",
    "mrr_10way",
    "top1_10way_hard",
    "top1_100way",
    "top1_document",
    "fve",
)
RETRIEVAL_SIZES = (2, 3, 5, 10, 20, 50, 100)
"""Sizes k of the k-way choices that make the retrieval curve."""
_BLOCK_ROWS = 1_024
_COMPARED_VALUES = 8_192
"""Activations compared at once."""


@dataclass(frozen=True)
class Figure:
    """sum(numerator) / sum(denominator) over rows: a ratio that can be recomputed on any resample
    of documents.

    Example: four answers, three of them right:
        Figure(numerator=tensor([1., 1., 0., 1.]), denominator=tensor([1., 1., 1., 1.]))
    """

    numerator: Tensor
    """[rows] float64."""
    denominator: Tensor
    """[rows] float64; all ones for a plain mean."""

    @classmethod
    def mean(cls, values: Tensor | Sequence[float]) -> Figure:
        """The mean of one value a row: [rows]."""
        numerator = torch.as_tensor(values, dtype=torch.float64)
        return cls(numerator, torch.ones_like(numerator))

    @property
    def value(self) -> float:
        """The figure over all rows; NaN when its denominator is 0."""
        return (self.numerator.sum() / self.denominator.sum()).item()

    def select(self, rows: Tensor) -> Figure:
        """The same figure over some rows (index or mask)."""
        return Figure(self.numerator[rows], self.denominator[rows])


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Evaluated rows and, fixed once for every verbalizer and scorer, what each is compared with
    (rows of the pool)."""

    pool: Tensor
    """v: [pool, d_model], raw: the rows compared, and what they are compared with."""
    rows: Tensor
    """Which rows of the pool are compared: [rows] int64."""
    mean: Tensor
    """mu over train: [d_model]."""
    wrong: Tensor
    """Row j of the 2-way choice and of the garbage cosine: [rows] int64."""
    others: Tensor
    """Random wrong rows, 99 or as many as there are; the first k - 1 make the k-way choice: [rows,
    others] int64."""
    hard_others: Tensor
    """The wrong rows of the hard 10-way choice: [rows, 9] int64."""
    document_others: Tensor
    """Other rows of the same document, filled up with -1: [rows, most] int64."""

    @classmethod
    def draw(
        cls,
        originals: Tensor,
        doc_ids: Sequence[str],
        mean: Tensor,
        seed: int,
        domains: Sequence[str] | None = None,
    ) -> Comparisons:
        """Seeded pairs and choices; every wrong row belongs to another document. Without `domains`
        all rows are of one.

        Raises ValueError for too few documents.
        """
        originals, mean = originals.float(), mean.float()
        outside = len(doc_ids) - int(_number(doc_ids).bincount().max()) if doc_ids else 0
        return cls(
            pool=originals,
            rows=torch.arange(len(originals)),
            mean=mean,
            wrong=derangement(doc_ids, seed),
            others=other_rows(doc_ids, max(NUM_OTHERS, min(MOST_OTHERS, outside)), seed + 1),
            hard_others=hard_rows(
                originals, doc_ids, domains or [""] * len(doc_ids), mean, NUM_OTHERS
            ),
            document_others=document_rows(doc_ids),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: Tensor) -> Comparisons:
        """The same comparisons for some of the rows (index into them), against the whole pool."""
        return dataclasses.replace(
            self,
            rows=self.rows[places],
            wrong=self.wrong[places],
            others=self.others[places],
            hard_others=self.hard_others[places],
            document_others=self.document_others[places],
        )

    @cached_property
    def originals(self) -> Tensor:
        """v of the rows compared: [rows, d_model], raw."""
        return self.pool[self.rows]

    @cached_property
    def centred(self) -> Tensor:
        """c(v) / |c(v)| of the pool: [pool, d_model]."""
        return vectors.direction(vectors.centre(self.pool, self.mean))

    def chances(self) -> dict[str, float]:
        """What a description that says nothing scores, for the metrics that are choices."""
        chances = {
            "top1": 1 / 2,
            "top1_2way": 1 / 2,
            "top1_10way": 1 / (1 + NUM_OTHERS),
            "top1_10way_hard": 1 / (1 + NUM_OTHERS),
            "mrr_10way": sum(1 / rank for rank in range(1, 2 + NUM_OTHERS)) / (1 + NUM_OTHERS),
            "top1_100way": 1 / (1 + MOST_OTHERS),
        }
        counts = (self.document_others >= 0).sum(1)
        if counts.any():
            chances["top1_document"] = (1 / (1 + counts[counts > 0])).mean().item()
        return chances


def derangement(doc_ids: Sequence[str], seed: int) -> Tensor:
    """A permutation that gives every row a row of another document: [rows] int64.

    Rows are laid out document by document in random order and shifted by a random amount that is at
    least the longest document, on either side. Raises ValueError when one document has more than
    half of the rows.
    """
    documents = _number(doc_ids)
    rows, longest = len(documents), int(documents.bincount().max()) if len(documents) else 0
    if rows < 2 or 2 * longest > rows:
        raise ValueError(
            f"derangement: got {rows} rows with {longest} of one document, expected at most half of"
            " the rows from one. Use a corpus with more documents."
        )
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(int(documents.max()) + 1, generator=generator)[documents]
    order = torch.argsort(places * rows + torch.randperm(rows, generator=generator))
    shift = int(torch.randint(longest, rows - longest + 1, (1,), generator=generator))
    result = torch.empty(rows, dtype=torch.int64)
    result[order] = order.roll(shift)
    return result


def other_rows(doc_ids: Sequence[str], num_others: int, seed: int) -> Tensor:
    """For every row `num_others` distinct rows of other documents, uniformly at random: [rows,
    num_others] int64.

    Raises ValueError when a row has fewer rows of other documents than that.
    """
    documents = _number(doc_ids)
    rows, longest = len(documents), int(documents.bincount().max()) if len(documents) else 0
    if rows - longest < num_others:
        raise ValueError(
            f"wrong rows: got {rows - longest} rows outside the longest document, expected at least"
            f" {num_others}. Evaluate more documents."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for block in documents.split(_BLOCK_ROWS):
        keys = torch.rand(len(block), rows, generator=generator)
        keys[block[:, None] == documents[None, :]] = -1.0
        chosen.append(keys.topk(num_others, dim=1).indices)
    return torch.cat(chosen)


def hard_rows(
    originals: Tensor, doc_ids: Sequence[str], domains: Sequence[str], mean: Tensor, num_others: int
) -> Tensor:
    """For every row the nearest rows of its domain in other documents, by centred cosine: [rows,
    num_others] int64.

    A domain with too few is filled up with the nearest rows of other domains.
    """
    documents, domain = _number(doc_ids), _number(domains)
    centred = vectors.direction(vectors.centre(originals, mean))
    chosen = []
    for rows in torch.arange(len(documents)).split(_BLOCK_ROWS):
        nearness = centred[rows] @ centred.T
        nearness -= 4.0 * (domain[rows, None] != domain[None, :])  # two cosines differ by 2 at most
        nearness[documents[rows, None] == documents[None, :]] = -torch.inf
        chosen.append(nearness.topk(num_others, dim=1).indices)
    return torch.cat(chosen)


def document_rows(doc_ids: Sequence[str]) -> Tensor:
    """For every row the other rows of its document, in order, filled up with -1: [rows, most]
    int64."""
    rows_of: dict[str, list[int]] = {}
    for row, doc_id in enumerate(doc_ids):
        rows_of.setdefault(doc_id, []).append(row)
    most = max(map(len, rows_of.values()), default=1) - 1
    others = [
        [other for other in rows_of[doc_id] if other != row] for row, doc_id in enumerate(doc_ids)
    ]
    return torch.tensor(
        [own + [-1] * (most - len(own)) for own in others], dtype=torch.int64
    ).reshape(len(others), most)


def figures(reconstructions: Tensor, comparisons: Comparisons) -> dict[str, Figure]:
    """The metrics of METRICS for reconstructions [rows, d_model] of the rows compared; without the
    100-way choice where there are too few rows, and without the one inside documents where all
    documents have one row.

    Raises ValueError for another number of rows and RuntimeError for values that are not finite.
    """
    if reconstructions.shape != comparisons.originals.shape:
        raise ValueError(
            f"reconstructions: got shape {tuple(reconstructions.shape)}, expected"
            f" {tuple(comparisons.originals.shape)}, one for each original. Reconstruct every"
            " description, empty ones too."
        )
    if not torch.isfinite(reconstructions).all():
        raise RuntimeError(
            "reconstructions: got values that are not finite, expected finite ones. "
            "Train the reconstructor again."
        )
    originals, mean = comparisons.originals, comparisons.mean
    correct = vectors.cosine(reconstructions, originals)
    garbage = vectors.cosine(reconstructions, comparisons.pool[comparisons.wrong])
    centred = vectors.centred_cosine(reconstructions, originals, mean)
    rank = ranks(reconstructions, comparisons, comparisons.others[:, :NUM_OTHERS])
    hard_rank = ranks(reconstructions, comparisons, comparisons.hard_others)
    error = vectors.squared_error(reconstructions, originals).double()
    spread = vectors.centre(originals, vectors.mean_direction(originals)).square().sum(-1).double()
    named = {
        "correct_cosine": Figure.mean(correct),
        "garbage_cosine": Figure.mean(garbage),
        "delta": Figure.mean(correct.double() - garbage.double()),
        "top1": Figure.mean(correct > garbage),
        "top1_2way": Figure.mean(
            ranks(reconstructions, comparisons, comparisons.wrong[:, None]) == 1
        ),
        "centred_cosine": Figure.mean(centred),
        "top1_10way": Figure.mean(rank == 1),
        "mrr_10way": Figure.mean(1.0 / rank.double()),
        "top1_10way_hard": Figure.mean(hard_rank == 1),
        "fve": Figure(spread - error, spread),
    }
    if comparisons.others.shape[1] >= MOST_OTHERS:
        named["top1_100way"] = Figure.mean(
            ranks(reconstructions, comparisons, comparisons.others[:, :MOST_OTHERS]) == 1
        )
    has_others = (comparisons.document_others >= 0).any(1).double()
    if has_others.any():
        document_rank = ranks(reconstructions, comparisons, comparisons.document_others)
        named["top1_document"] = Figure((document_rank == 1) * has_others, has_others)
    return {metric: named[metric] for metric in METRICS if metric in named}


def retrieval(reconstructions: Tensor, comparisons: Comparisons) -> dict[int, Figure]:
    """k -> top-1 among k activations by centred cosine, for the sizes of RETRIEVAL_SIZES that there
    are rows for."""
    better = beaten_by(reconstructions, comparisons, comparisons.others)
    return {
        size: Figure.mean(~better[:, : size - 1].any(1))
        for size in RETRIEVAL_SIZES
        if size - 1 <= better.shape[1]
    }


def ranks(reconstructions: Tensor, comparisons: Comparisons, others: Tensor) -> Tensor:
    """Rank of the right row among itself and `others` [rows, k] by centred cosine: [rows] int64, 1
    is best."""
    return 1 + beaten_by(reconstructions, comparisons, others).sum(1)


def beaten_by(reconstructions: Tensor, comparisons: Comparisons, others: Tensor) -> Tensor:
    """Whether each of `others` [rows, k] fits at least as well as the right row by centred cosine:
    [rows, k] bool.

    A tie counts against the right row; -1 stands for no row and never fits.
    """
    centred = vectors.direction(vectors.centre(reconstructions, comparisons.mean))
    blocks = []
    for rows in torch.arange(len(comparisons)).split(
        _COMPARED_VALUES // (1 + others.shape[1]) or 1
    ):
        candidates = torch.cat([comparisons.rows[rows, None], others[rows]], dim=1)
        scores = torch.einsum("rd,rkd->rk", centred[rows], comparisons.centred[candidates])
        blocks.append((scores[:, 1:] >= scores[:, :1]) & (others[rows] >= 0))
    return torch.cat(blocks)


def nearest_rows(queries: Tensor, candidates: Tensor, mean: Tensor) -> Tensor:
    """Index of the candidate with the highest centred cosine to each query: [queries, d_model] ->
    [queries] int64.

    Candidates are read block by block, so that a memory-mapped table of any size is never loaded
    whole.
    """
    centred = vectors.direction(vectors.centre(queries, mean))
    best = torch.full((len(queries),), -torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(candidates), _BLOCK_ROWS):
        block = vectors.direction(vectors.centre(candidates[start : start + _BLOCK_ROWS], mean))
        scores, places = (centred @ block.T).max(1)
        better = scores > best
        best[better], index[better] = scores[better], places[better] + start
    return index


def _number(names: Sequence[str]) -> Tensor:
    """Each row's document (or domain) as a number, in order of the names: [rows] int64."""
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)
