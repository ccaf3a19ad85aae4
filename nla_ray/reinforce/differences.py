"""Differences of two train activations among the prompts of GRPO.

A difference n(a) - n(b) of two families is a further row of the bank, behind the activations: what
is injected is the difference, what scorers compare is the vector that lies its way from the mean
(`vectors.beside_mean`). So actors, trainer and credit treat it as any row. Its wrong rows are other
differences, half of them of the same first activation: against those of other ones alone, whoever
describes a earns all there is, and nothing is learned of b. A claim counts as found where a's text
has it and b's has not: what both have is true of a, but tells nothing of their difference, and the
labels that SFT has learned from leave it out. Protects the rule that nothing changes without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from nla_ray.activation.vectors import beside_mean, direction_difference
from nla_ray.reinforce.rewards import WrongActivations
from nla_ray.run.identity import seed_of
from nla_ray.score.comparisons import family_pairs, rows_of_neither
from nla_ray.settings.config import GRPOSettings

if TYPE_CHECKING:
    from nla_ray.activation.bank import ActivationTable

_SECONDS_OF_FIRST = 4
"""Differences of each first activation: one is described, the others are wrong ones for it."""
_FEWEST_FIRSTS = 64
"""However few differences are described, wrong ones are drawn of as many firsts."""


@dataclass(frozen=True, kw_only=True)
class TrainDifferences:
    """The differences of a training, each with its place among the rows of the bank.

    Example: two firsts of 10 activations, with two seconds each: first_row=10,
    firsts=[3, 7, 3, 7], seconds=[5, 1, 8, 2]; row 12 is n(row 3) - n(row 8).
    """

    first_row: int
    """Activations in the bank: the row of the first difference."""
    firsts: Sequence[int]
    seconds: Sequence[int]
    family_ids: Sequence[str]
    """Of the first activations."""
    injected: Tensor
    """[differences, vectors, d_model]."""
    compared: Tensor
    """[differences, d_model]: what scorers compare."""

    def schedule(self, batches: Sequence[Sequence[int]], per_step: int) -> list[list[int]]:
        """The batches, each with the next `per_step` differences behind its activations."""
        start = self.first_row
        return [
            [*batch, *range(start + number * per_step, start + (number + 1) * per_step)]
            for number, batch in enumerate(batches)
        ]

    def texts_of(
        self, rows: Sequence[int], texts: Sequence[str]
    ) -> tuple[dict[int, str], dict[int, str]]:
        """By row of the bank the texts of the first and of the second activation.

        `rows`: those of activations are left out. `texts`: of all activations.
        """
        ends: list[dict[int, str]] = []
        for activations in (self.firsts, self.seconds):
            of_row: Mapping[int, int] = dict(enumerate(activations, self.first_row))
            ends.append({row: texts[of_row[row]] for row in rows if row in of_row})
        return ends[0], ends[1]


def draw_train_differences(
    train: ActivationTable, settings: GRPOSettings, mean: Tensor
) -> TrainDifferences | None:
    """As many as are scheduled, or some more to be told from; None where no prompt is one.

    `mean`: mu. Raises ValueError for too few families.
    """
    if not settings.differences_per_step:
        return None
    needed = settings.differences_per_step * settings.num_batches
    count = max(_FEWEST_FIRSTS, -(-needed // _SECONDS_OF_FIRST))
    seed = seed_of(settings.seed, "differences")
    chosen, partners = family_pairs(train.family_ids, count, seed)
    others = rows_of_neither(train.family_ids, chosen, partners, _SECONDS_OF_FIRST - 1, seed)
    firsts = chosen * _SECONDS_OF_FIRST
    seconds = [*partners, *others.T.flatten().tolist()]
    difference = direction_difference(train.vectors[firsts], train.vectors[seconds])
    return TrainDifferences(
        first_row=len(train),
        firsts=firsts,
        seconds=seconds,
        family_ids=[train.family_ids[row] for row in firsts],
        injected=direction_difference(train.injected[firsts], train.injected[seconds]),
        compared=beside_mean(difference, mean),
    )


class WrongRows:
    """Draws wrong rows: activations for an activation, and differences for a difference.

    Of those for a difference at most half have its first activation.
    """

    def __init__(
        self, activations: WrongActivations, differences: TrainDifferences, settings: GRPOSettings
    ) -> None:
        """`activations`: draws those of an activation. Raises ValueError for too few families."""
        self._activations, self._start = activations, differences.first_row
        wanted, count = settings.num_wrong + settings.num_near, len(differences.firsts)
        firsts = count // _SECONDS_OF_FIRST
        same_first = [
            [other for other in range(number % firsts, count, firsts) if other != number]
            for number in range(count)
        ]
        num_same = min(_SECONDS_OF_FIRST - 1, wanted // 2)
        self._differences = WrongActivations(
            differences.family_ids, wanted - num_same, same_first, num_same
        )

    def draw(self, row: int, seed: int, step: int) -> list[int]:
        """Different wrong rows of `row`: a function of (seed, step, row) alone."""
        if row < self._start:
            return self._activations.draw(row, seed, step)
        drawn = self._differences.draw(row - self._start, seed_of(seed, "differences"), step)
        return [self._start + number for number in drawn]
