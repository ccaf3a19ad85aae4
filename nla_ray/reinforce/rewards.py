"""The reward: pure functions from scores and texts to named terms, and the rows they are about.

    reward = score(right) - mean score(wrong) - unclosed - empty - over-long - repeated (+ evidence)

Every term has a name, under which it is logged, and a weight, which comes from the configuration.
`score_term` is what a score pays. To add a term, compute it in `text_terms`, name it in TEXT_TERMS
and weigh it in `reward_weights`. Knows neither models nor Ray nor TRL. Protects two rules: wrong
activations come from OTHER families and are the same for the whole group of an activation, so that
the draw cancels in the advantage; no description is left out, however bad it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nla_ray.base.prompts import parse_description
from nla_ray.run.identity import seed_of
from nla_ray.score.claims import claim_precision, repeats_item
from nla_ray.settings.config import GRPOSettings

SCORE = "score"
"""The term that the reward scorer decides."""
TEXT_TERMS = ("unclosed", "empty", "over_length", "repeated", "evidence")
"""The terms that the description's text alone decides."""


def contrast(right: Tensor, wrong: Tensor) -> Tensor:
    """score(right) - mean_k score(wrong_k): [n], [n, k] -> [n].

    A description that fits every activation earns nothing, whatever its cosine with the right one.
    Source: the contrastive reward of the public recipe, with k wrong activations instead of one.

    >>> import torch
    >>> contrast(torch.tensor([0.75]), torch.tensor([[0.25, 0.5]]))
    tensor([0.3750])
    """
    return right - wrong.mean(dim=1)


def score_term(
    settings: GRPOSettings,
    *,
    right: Tensor,
    wrong: Tensor,
    centred_right: Tensor,
    centred_wrong: Tensor,
) -> Tensor:
    """What is paid for the reward scorer's cosines: [n].

    The contrast, centred or not; the ablation's raw cosine. `right`, `centred_right`: [n], with the
    right activation. `wrong`, `centred_wrong`: [n, k], with wrong ones.
    """
    if settings.contrast == "none":
        return right
    if settings.centred:
        return contrast(centred_right, centred_wrong)
    return contrast(right, wrong)


def reward_weights(settings: GRPOSettings) -> dict[str, float]:
    """The weight of every term by name; penalties are negative. Reward = sum of weight x term."""
    return {
        SCORE: 1.0,
        "unclosed": -settings.unclosed_penalty,
        "empty": -settings.empty_penalty,
        "over_length": -settings.length_penalty,
        "repeated": -settings.repeat_penalty,
        "evidence": settings.evidence_weight,
    }


def text_terms(
    written: str, num_tokens: int, source: str, soft_max_tokens: int, without: str = ""
) -> dict[str, float]:
    """The terms that the description's text alone decides, unweighted, by the names in TEXT_TERMS.

    `written`: as sampled, closing tag included when it came. `source`: the train text behind the
    activation. `over_length` is in tokens, `evidence` is the share of the claims that `source`
    bears out, the others are 0 or 1. `without`: of a difference the text of its second activation,
    which bears nothing out.

    >>> text_terms("- Python test: frame, frame", 9, "the frame", soft_max_tokens=8)
    {'unclosed': 1.0, 'empty': 0.0, 'over_length': 1.0, 'repeated': 1.0, 'evidence': 1.0}
    """
    text, closed = parse_description(written)
    return {
        "unclosed": float(not closed),
        "empty": float(not text),
        "over_length": float(max(0, num_tokens - soft_max_tokens)),
        "repeated": float(repeats_item(text)),
        "evidence": claim_precision(text, source, without),
    }


def beginning_worth(text: str, source: str, settings: GRPOSettings, without: str = "") -> float:
    """What a description's beginning earns beside its score: its evidence, less its repeats.

    `without`: as in `text_terms`. Half of these claims are in the source:

    >>> beginning_worth("- tokens: frame, index", "x = index", GRPOSettings(evidence_weight=0.1))
    0.05
    """
    evidence = settings.evidence_weight * claim_precision(text, source, without)
    return evidence - settings.repeat_penalty * repeats_item(text)


class WrongActivations:
    """Draws wrong rows of the activation bank: rows of other families than a given row's.

    `families`: the family_id of every row of the bank. `near`: for every row the rows that are
    hardest to tell from it; `count_near` of them are drawn beside `count` of any. Raises ValueError
    when the bank has fewer than `count` rows outside its largest family, or fewer near rows than
    are to be drawn.
    """

    def __init__(
        self,
        families: Sequence[str],
        count: int,
        near: Sequence[Sequence[int]] | None = None,
        count_near: int = 0,
    ) -> None:
        names, self._family = np.unique(np.asarray(families), return_inverse=True)
        available = len(families) - int(np.bincount(self._family).max()) if len(families) else 0
        pool = len(near[0]) if near else 0
        if available < count or pool < count_near:
            raise ValueError(
                f"wrong activations: got {available} rows from other families ({len(names)} train"
                f" families) and {pool} near ones, expected at least {count} and {count_near}."
                " Lower --grpo.num-wrong and --grpo.num-near, or enlarge the corpus."
            )
        self._count, self._near, self._count_near = count, near, count_near

    def draw(self, row: int, seed: int, step: int) -> list[int]:
        """Different wrong rows of `row`: those of any other family first, then the near ones.

        A function of (seed, step, row) alone; every step draws anew.
        """
        generator = np.random.default_rng(seed_of(seed, "wrong", str(step), str(row)))
        drawn: list[int] = []
        while len(drawn) < self._count:
            candidates = generator.integers(len(self._family), size=2 * self._count)
            for candidate in dict.fromkeys(candidates.tolist()):
                if self._family[candidate] != self._family[row] and candidate not in drawn:
                    drawn.append(candidate)
        del drawn[self._count :]
        if not self._count_near:
            return drawn
        near = generator.choice(self._near[row], self._count_near, replace=False)
        return drawn + near.tolist()


def schedule_rows(
    num_rows: int, prompts_per_step: int, num_batches: int, seed: int
) -> list[list[int]]:
    """Which rows of the bank each batch of prompts describes: seeded passes over all rows.

    No batch has a row twice. The schedule is written down before training, so that a resumed run
    meets the same batches in the same order. Raises ValueError when the bank is smaller than a
    batch.

    >>> schedule_rows(4, prompts_per_step=2, num_batches=3, seed=0)
    [[2, 3], [1, 0], [1, 3]]
    """
    if num_rows < prompts_per_step:
        raise ValueError(
            f"train activations: got {num_rows}, expected at least {prompts_per_step}, one for"
            " every prompt of a step. Lower --grpo.prompts-per-step or enlarge the corpus."
        )
    batches: list[list[int]] = []
    while len(batches) < num_batches:
        generator = np.random.default_rng(seed_of(seed, "schedule", str(len(batches))))
        order = generator.permutation(num_rows).tolist()
        whole = num_rows - num_rows % prompts_per_step
        for start in range(0, whole, prompts_per_step):
            batches.append(order[start : start + prompts_per_step])
    return batches[:num_batches]
