"""How likely a word is in a text, read from the activation by a probe that never saw the text.

The rows are cut into folds by content family; the probe of a fold is fitted to all other folds. Its
scores become probabilities by one logistic regression over all words: of the score, its square, and
the log-odds of the word's share. Both are closed forms or a few passes, linear in rows; of every
row only a block is in memory. Pure: it is given activations and texts, and knows no run. Protects
the rule that no text is judged by a probe that learned from it. Source of the calibration: Platt,
"Probabilistic Outputs for Support Vector Machines", 1999.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nla_ray.activation.bank import drawn_rows
from nla_ray.run.identity import seed_of
from nla_ray.score.probe import (
    BLOCK_ROWS,
    ProbeSums,
    WordProbe,
    best_penalty,
    probed_words,
    words_of,
)

FOLDS = 5
_CALIBRATED_ROWS = 2_048
"""Rows, with all words, that the calibration is fitted to."""
_NEWTON_STEPS = 25
_LEAST_SCORE, _LARGEST_SCORE = -3.0, 8.0
"""In standard deviations; the square of a score beyond would bend the curve back."""
_DAMPING = 1e-3
_LEAST_SHARE = 1e-6
_NUM_INPUTS = 4


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """Probes of words, one for every fold and one for rows of no fold, with one calibration.

    Example: words=["frame"], folds=<probes>, whole=<probe>, fold_of=[0, 1, 0],
    log_odds=<[1]>, coefficients=<[4]>
    """

    words: list[str]
    folds: list[WordProbe]
    """Each fitted to the rows of all other folds."""
    whole: WordProbe
    """Fitted to all rows: for activations of other documents."""
    fold_of: list[int]
    """Of every row that the probes were fitted to."""
    log_odds: Float[Tensor, " words"]
    """Of the share of texts that have each word."""
    coefficients: Float[Tensor, 4]
    """Of 1, the score, its square, and the log-odds."""

    def blocks(
        self, activations: Float[Tensor, "rows d_model"], *, fitted: bool
    ) -> Iterator[tuple[range, Float[Tensor, "block words"]]]:
        """Rows, and the probability that each word is in their texts, block by block.

        `fitted`: the activations are those that the probes were fitted to, in the same order; each
        is read by the probe of its fold. Else they are of other documents.
        """
        for start in range(0, len(activations), BLOCK_ROWS):
            rows = range(start, min(start + BLOCK_ROWS, len(activations)))
            scores = self._scores(activations[start : rows.stop], rows, fitted)
            yield rows, torch.sigmoid(_inputs(scores, self.log_odds) @ self.coefficients)

    def _scores(self, block: Tensor, rows: range, fitted: bool) -> Tensor:
        if not fitted:
            return self.whole.scores(block)
        folds = torch.tensor([self.fold_of[row] for row in rows])
        scores = torch.empty(len(block), len(self.words))
        for fold in folds.unique().tolist():
            scores[folds == fold] = self.folds[fold].scores(block[folds == fold])
        return scores


def cross_fit(
    activations: Float[Tensor, "rows d_model"],
    texts: Sequence[str],
    families: Sequence[str],
    mean: Float[Tensor, " d_model"],
    seed: int = 0,
) -> CrossFitted:
    """Fit all of it to the train rows. `mean`: mu.

    Raises ValueError for rows of a single family.
    """
    fold_of, num_folds = _folds(families, seed)
    held = [words_of(text) for text in texts]
    words, of_fold = probed_words(held), torch.tensor(fold_of)
    parts = [torch.nonzero(of_fold == fold).flatten() for fold in range(num_folds)]
    held_of_part = [[held[row] for row in rows.tolist()] for rows in parts]
    sums = [
        ProbeSums.of(activations[rows], of_part, words, mean)
        for rows, of_part in zip(parts, held_of_part, strict=True)
    ]
    total = functools.reduce(operator.add, sums)
    penalty = best_penalty(total - sums[0], words, mean, activations[parts[0]], held_of_part[0])
    log_odds = torch.logit(total.shares.float(), eps=_LEAST_SHARE)
    uncalibrated = CrossFitted(
        words=words,
        folds=[(total - part).solve(words, mean, penalty) for part in sums],
        whole=total.solve(words, mean, penalty),
        fold_of=fold_of,
        log_odds=log_odds,
        coefficients=torch.zeros(_NUM_INPUTS),
    )
    return dataclasses.replace(
        uncalibrated, coefficients=_calibrate(uncalibrated, activations, held, seed)
    )


def _folds(families: Sequence[str], seed: int) -> tuple[list[int], int]:
    """The fold of every row, families whole, and how many folds there are: FOLDS at most."""
    names = sorted(set(families), key=lambda name: seed_of(seed, "fold", name))
    if len(names) < 2:
        raise ValueError(
            f"train families of a cross-fitted probe: got {len(names)}, expected at least 2."
            " Use texts of several documents."
        )
    count = min(FOLDS, len(names))
    fold_of_family = {name: number % count for number, name in enumerate(names)}
    return [fold_of_family[name] for name in families], count


def _calibrate(
    fitted: CrossFitted,
    activations: Float[Tensor, "rows d_model"],
    held: Sequence[frozenset[str]],
    seed: int,
) -> Float[Tensor, 4]:
    """Logistic regression of presence, by Newton's method, on all words of a seeded choice of rows.

    The damping keeps it finite where a few rows can be told apart without error.
    """
    chosen = drawn_rows(len(held), _CALIBRATED_ROWS, seed)
    number_of = {word: number for number, word in enumerate(fitted.words)}
    inputs, present = [], []
    for row in chosen:
        block = activations[row : row + 1]
        scores = fitted.folds[fitted.fold_of[row]].scores(block)
        inputs.append(_inputs(scores, fitted.log_odds)[0])
        found = torch.zeros(len(fitted.words))
        found[[number_of[word] for word in held[row] if word in number_of]] = 1.0
        present.append(found)
    x, y = torch.cat(inputs).double(), torch.cat(present).double()
    coefficients = torch.zeros(_NUM_INPUTS, dtype=torch.float64)
    damping = _DAMPING * torch.eye(_NUM_INPUTS, dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid(x @ coefficients)
        gradient = x.T @ (y - probability) - damping @ coefficients
        curvature = (x * (probability * (1 - probability))[:, None]).T @ x + damping
        coefficients = coefficients + torch.linalg.solve(curvature, gradient)
    return coefficients.float()


def _inputs(
    scores: Float[Tensor, "rows words"], log_odds: Float[Tensor, " words"]
) -> Float[Tensor, "rows words 4"]:
    """1, the score, its square, and the log-odds of the word's share."""
    bounded = scores.clamp(_LEAST_SCORE, _LARGEST_SCORE)
    ones = torch.ones_like(bounded)
    return torch.stack([ones, bounded, bounded.square(), log_odds.expand_as(bounded)], dim=-1)
