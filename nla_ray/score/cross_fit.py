"""How likely a word is in a text, read from the activation by a probe that was not fitted to it.

The rows are cut into folds by content family; the probe of a fold is fitted to all other folds. Its
scores become probabilities by one logistic regression over all words: of the score, its square, and
the log-odds of the word's share. Both are closed forms or a few passes, linear in rows; only a
block of rows is in memory, and those that calibrate. Pure: it is given activations and texts, and
knows no run. Protects the rule that no text is judged by weights that were fitted to it; what all
folds share (the words, the penalty, the calibration) has seen every text.
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
from nla_ray.score.logistic import fit_constant, fit_logistic
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
_SHARES = (0.002, 1.0)
"""Of the train texts that have a word of the probe: a word of almost all is read most surely."""
_LEAST_SCORE, _LARGEST_SCORE = -3.0, 8.0
"""In standard deviations; calibrating rows have hardly any beyond."""
_LEAST_SHARE = 1e-6
_NUM_INPUTS = 4


@dataclass(frozen=True, kw_only=True)
class CalibratedProbe:
    """A probe of words, and what makes its scores probabilities.

    Example: probe=<of ["frame"]>, log_odds=<[1]>, coefficients=<[4]>
    """

    probe: WordProbe
    log_odds: Float[Tensor, " words"]
    """Of the share of texts that have each word."""
    coefficients: Float[Tensor, 4]
    """Of 1, the score, its square, and the log-odds."""

    def probabilities(
        self, activations: Float[Tensor, "rows d_model"]
    ) -> Float[Tensor, "rows words"]:
        """That each word is in the texts of activations that the probe was not fitted to."""
        return self.calibrated(self.probe.scores(activations))

    def calibrated(self, scores: Float[Tensor, "rows words"]) -> Float[Tensor, "rows words"]:
        """Probabilities, which rise with the score: beyond the parabola's vertex they stay."""
        bounded = _up_to_vertex(scores, self.coefficients)
        return torch.sigmoid(_inputs(bounded, self.log_odds) @ self.coefficients)


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """Probes of words, one for every fold and one for rows of no fold, with one calibration.

    Example: folds=<probes>, whole=<probe>, fold_of=[0, 1, 0]
    """

    folds: list[WordProbe]
    """Each fitted to the rows of all other folds."""
    whole: CalibratedProbe
    """Fitted to all rows: for activations of other documents. Its calibration is everyone's."""
    fold_of: list[int]
    """Of every row that the probes were fitted to."""

    @property
    def words(self) -> list[str]:
        """The words of every probe."""
        return self.whole.probe.words

    def blocks(
        self, activations: Float[Tensor, "rows d_model"], *, fitted: bool
    ) -> Iterator[tuple[range, Float[Tensor, "block words"]]]:
        """Rows, and the probability that each word is in their texts, block by block.

        `fitted`: the activations are those that the probes were fitted to, in the same order; each
        is read by the probe of its fold. Else they are of other documents.
        """
        for start in range(0, len(activations), BLOCK_ROWS):
            rows = range(start, min(start + BLOCK_ROWS, len(activations)))
            block = activations[start : rows.stop]
            yield (
                rows,
                self.whole.calibrated(self.out_of_fold_scores(block, rows))
                if fitted
                else self.whole.probabilities(block),
            )

    def out_of_fold_scores(
        self, activations: Float[Tensor, "block d_model"], rows: Sequence[int]
    ) -> Float[Tensor, "block words"]:
        """Scores by the probes that were not fitted to them; `rows`: which of the rows they are."""
        folds = torch.tensor([self.fold_of[row] for row in rows])
        scores = torch.empty(len(activations), len(self.words))
        for fold in folds.unique().tolist():
            scores[folds == fold] = self.folds[fold].scores(activations[folds == fold])
        return scores


def cross_fit(
    activations: Float[Tensor, "rows d_model"],
    texts: Sequence[str],
    families: Sequence[str],
    mean: Float[Tensor, " d_model"],
    seed: int = 0,
) -> CrossFitted:
    """Fit all of it to the train rows. `mean`: mu.

    Raises ValueError for rows of fewer than FOLDS families.
    """
    fold_of = _folds(families, seed)
    held = [words_of(text) for text in texts]
    words, of_fold = probed_words(held, _SHARES), torch.tensor(fold_of)
    parts = [torch.nonzero(of_fold == fold).flatten() for fold in range(FOLDS)]
    held_of_part = [[held[row] for row in rows.tolist()] for rows in parts]
    sums = [
        ProbeSums.of(activations[rows], of_part, words, mean)
        for rows, of_part in zip(parts, held_of_part, strict=True)
    ]
    total = functools.reduce(operator.add, sums)
    penalty = best_penalty(total - sums[0], words, mean, activations[parts[0]], held_of_part[0])
    log_odds = torch.logit(total.shares.float(), eps=_LEAST_SHARE)
    whole = CalibratedProbe(
        probe=total.solve(words, mean, penalty),
        log_odds=log_odds,
        coefficients=torch.zeros(_NUM_INPUTS),
    )
    uncalibrated = CrossFitted(
        folds=[(total - part).solve(words, mean, penalty) for part in sums],
        whole=whole,
        fold_of=fold_of,
    )
    coefficients = _calibrate(uncalibrated, activations, held, seed)
    return dataclasses.replace(
        uncalibrated, whole=dataclasses.replace(whole, coefficients=coefficients)
    )


def _folds(families: Sequence[str], seed: int) -> list[int]:
    """The fold of every row; a family is in one."""
    names = sorted(set(families), key=lambda name: seed_of(seed, "fold", name))
    if len(names) < FOLDS:
        raise ValueError(
            f"train families of a cross-fitted probe: got {len(names)}, expected at least {FOLDS}."
            " Use texts of more documents."
        )
    fold_of_family = {name: number % FOLDS for number, name in enumerate(names)}
    return [fold_of_family[name] for name in families]


def _calibrate(
    fitted: CrossFitted,
    activations: Float[Tensor, "rows d_model"],
    held: Sequence[frozenset[str]],
    seed: int,
) -> Float[Tensor, 4]:
    """Logistic regression of presence on all words of a seeded choice of rows."""
    chosen = drawn_rows(len(held), _CALIBRATED_ROWS, seed)
    scores, log_odds = fitted.out_of_fold_scores(activations[chosen], chosen), fitted.whole.log_odds
    y = torch.tensor([word in held[row] for row in chosen for word in fitted.words]).double()
    coefficients = fit_logistic(_inputs(scores, log_odds).flatten(0, 1), y)
    bounded = _inputs(_up_to_vertex(scores, coefficients), log_odds).flatten(0, 1)
    return fit_constant(bounded, y, coefficients).float()


def _up_to_vertex(scores: Tensor, coefficients: Float[Tensor, 4]) -> Tensor:
    """Scores, held where the parabola of the coefficients would turn back."""
    _, slope, bend, _ = coefficients.tolist()
    if not bend:
        return scores
    vertex = -slope / (2 * bend)
    return scores.clamp(max=vertex) if bend < 0 else scores.clamp(min=vertex)


def _inputs(
    scores: Float[Tensor, "rows words"], log_odds: Float[Tensor, " words"]
) -> Float[Tensor, "rows words 4"]:
    """1, the score, its square, and the log-odds of the word's share."""
    bounded = scores.clamp(_LEAST_SCORE, _LARGEST_SCORE)
    ones = torch.ones_like(bounded)
    return torch.stack([ones, bounded, bounded.square(), log_odds.expand_as(bounded)], dim=-1)
