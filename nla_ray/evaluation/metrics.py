"""The figures of a verbalizer under a scorer, as values per row; how rows are paired with wrong ones.

Pure arithmetic on reconstructions and originals: it knows neither text nor files, so training's monitor may call it
too. Intervals are `bootstrap.py`'s. Source: the evaluation definitions; notation as in `vectors.py`:

    correct_cosine   mean cos(r_i, v_i)                     raw
    garbage_cosine   mean cos(r_i, v_j)                     raw; j a fixed random derangement, other document
    delta            correct - garbage
    top1             share of cos(r_i, v_i) > cos(r_i, v_j) 2-way, chance 0.5
    centred_cosine   mean cos(c(r_i), c(v_i))
    top1_10way       share of v_i ranked first among 9 others by centred cosine, chance 0.1
    mrr_10way        mean of 1 / rank, chance 0.29
    top1_10way_hard  the same share among the 9 nearest activations of the domain, in other documents
    fve              1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2

A tie counts against the right row: a constant reconstruction earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_ray import vectors

NUM_OTHERS = 9
"""Wrong rows beside the right one in the 10-way choice."""
METRICS = ("correct_cosine", "garbage_cosine", "delta", "top1", "centred_cosine", "top1_10way", "mrr_10way",
           "top1_10way_hard", "fve")
_BLOCK_ROWS = 1_024


@dataclass(frozen=True)
class Figure:
    """sum(numerator) / sum(denominator) over rows: a ratio that can be recomputed on any resample of documents.

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
    """Evaluated rows and, fixed once for every verbalizer and scorer, what each is compared with."""

    originals: Tensor
    """v: [rows, d_model], raw."""
    mean: Tensor
    """mu over train: [d_model]."""
    wrong: Tensor
    """Row j of the 2-way choice and of the garbage cosine: [rows] int64."""
    others: Tensor
    """The wrong rows of the 10-way choice: [rows, 9] int64."""
    hard_others: Tensor
    """The wrong rows of the hard 10-way choice: [rows, 9] int64."""

    @classmethod
    def draw(cls, originals: Tensor, doc_ids: Sequence[str], mean: Tensor, seed: int,
             domains: Sequence[str] | None = None) -> Comparisons:
        """Seeded pairs and choices; every wrong row belongs to another document. Without `domains` all rows are of one.

        Raises ValueError for too few documents.
        """
        originals, mean = originals.float(), mean.float()
        return cls(originals=originals, mean=mean, wrong=derangement(doc_ids, seed),
                   others=other_rows(doc_ids, NUM_OTHERS, seed + 1),
                   hard_others=hard_rows(originals, doc_ids, domains or [""] * len(doc_ids), mean, NUM_OTHERS))

    def __len__(self) -> int:
        return len(self.originals)


def derangement(doc_ids: Sequence[str], seed: int) -> Tensor:
    """A permutation that gives every row a row of another document: [rows] int64.

    Rows are laid out document by document in random order and shifted by a random amount that is at least the longest
    document, on either side. Raises ValueError when one document has more than half of the rows.
    """
    documents = _number(doc_ids)
    rows, longest = len(documents), int(documents.bincount().max()) if len(documents) else 0
    if rows < 2 or 2 * longest > rows:
        raise ValueError(f"derangement: got {rows} rows with {longest} of one document, expected at most half of "
                         "the rows from one. Evaluate more documents.")
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(int(documents.max()) + 1, generator=generator)[documents]
    order = torch.argsort(places * rows + torch.randperm(rows, generator=generator))
    shift = int(torch.randint(longest, rows - longest + 1, (1,), generator=generator))
    result = torch.empty(rows, dtype=torch.int64)
    result[order] = order.roll(shift)
    return result


def other_rows(doc_ids: Sequence[str], num_others: int, seed: int) -> Tensor:
    """For every row `num_others` distinct rows of other documents, uniformly at random: [rows, num_others] int64.

    Raises ValueError when a row has fewer rows of other documents than that.
    """
    documents = _number(doc_ids)
    rows, longest = len(documents), int(documents.bincount().max()) if len(documents) else 0
    if rows - longest < num_others:
        raise ValueError(f"wrong rows: got {rows - longest} rows outside the longest document, expected at least "
                         f"{num_others}. Evaluate more documents.")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for block in documents.split(_BLOCK_ROWS):
        keys = torch.rand(len(block), rows, generator=generator)
        keys[block[:, None] == documents[None, :]] = -1.0
        chosen.append(keys.topk(num_others, dim=1).indices)
    return torch.cat(chosen)


def hard_rows(originals: Tensor, doc_ids: Sequence[str], domains: Sequence[str], mean: Tensor,
              num_others: int) -> Tensor:
    """For every row the nearest rows of its domain in other documents, by centred cosine: [rows, num_others] int64.

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


def figures(reconstructions: Tensor, comparisons: Comparisons) -> dict[str, Figure]:
    """Every metric of METRICS for reconstructions [rows, d_model] of the rows compared.

    Raises ValueError for another number of rows and RuntimeError for values that are not finite.
    """
    if reconstructions.shape != comparisons.originals.shape:
        raise ValueError(f"reconstructions: got shape {tuple(reconstructions.shape)}, expected "
                         f"{tuple(comparisons.originals.shape)}, one for each original. Reconstruct every description, "
                         "empty ones too.")
    if not torch.isfinite(reconstructions).all():
        raise RuntimeError("reconstructions: got values that are not finite, expected finite ones. "
                           "Train the reconstructor again.")
    originals, mean = comparisons.originals, comparisons.mean
    correct = vectors.cosine(reconstructions, originals)
    garbage = vectors.cosine(reconstructions, originals[comparisons.wrong])
    centred = vectors.centred_cosine(reconstructions, originals, mean)
    rank = ranks(reconstructions, comparisons, comparisons.others)
    hard_rank = ranks(reconstructions, comparisons, comparisons.hard_others)
    error = vectors.squared_error(reconstructions, originals).double()
    spread = vectors.centre(originals, vectors.mean_direction(originals)).square().sum(-1).double()
    return {
        "correct_cosine": Figure.mean(correct),
        "garbage_cosine": Figure.mean(garbage),
        "delta": Figure.mean(correct.double() - garbage.double()),
        "top1": Figure.mean(correct > garbage),
        "centred_cosine": Figure.mean(centred),
        "top1_10way": Figure.mean(rank == 1),
        "mrr_10way": Figure.mean(1.0 / rank.double()),
        "top1_10way_hard": Figure.mean(hard_rank == 1),
        "fve": Figure(spread - error, spread),
    }


def ranks(reconstructions: Tensor, comparisons: Comparisons, others: Tensor) -> Tensor:
    """Rank of the right row among itself and `others` [rows, k] by centred cosine: [rows] int64, 1 is best.

    A tie counts against the right row.
    """
    blocks = []
    for rows in torch.arange(len(comparisons)).split(_BLOCK_ROWS):
        candidates = torch.cat([rows[:, None], others[rows]], dim=1)
        compared = comparisons.originals[candidates]
        scores = vectors.centred_cosine(reconstructions[rows, None], compared, comparisons.mean)
        blocks.append(1 + (scores[:, 1:] >= scores[:, :1]).sum(1))
    return torch.cat(blocks)


def nearest_rows(queries: Tensor, candidates: Tensor, mean: Tensor) -> Tensor:
    """Index of the candidate with the highest centred cosine to each query: [queries, d_model] -> [queries] int64.

    Candidates are read block by block, so that a memory-mapped table of any size is never loaded whole.
    """
    centred = vectors.direction(vectors.centre(queries, mean))
    best = torch.full((len(queries),), -torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(candidates), _BLOCK_ROWS):
        block = vectors.direction(vectors.centre(candidates[start:start + _BLOCK_ROWS], mean))
        scores, places = (centred @ block.T).max(1)
        better = scores > best
        best[better], index[better] = scores[better], places[better] + start
    return index


def _number(names: Sequence[str]) -> Tensor:
    """Each row's document (or domain) as a number, in order of the names: [rows] int64."""
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)
