"""What a description is paid for: pure functions from scores and texts to named reward terms.

    reward = score(right) - mean score(wrong) - unclosed - empty - over-long - repeated (+ evidence)

Every term has a name under which it is logged and a weight that comes from the configuration. It
knows neither models nor Ray nor TRL. Two rules it protects: wrong activations come from OTHER
documents and are the same for the whole group of an activation, so that the draw cancels in the
advantage; no description is left out, however bad it is.
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
TEXT_TERMS = ("unclosed", "empty", "over_length", "repeated", "evidence")


def contrast(right: Tensor, wrong: Tensor) -> Tensor:
    """score(right) - mean_k score(wrong_k): [n], [n, k] -> [n].

    A description that fits every activation earns nothing, whatever its cosine with the right one.
    Example: right 0.6, wrong 0.1 and 0.3 -> 0.4.
    Source: the contrastive reward of the public recipe, with k wrong activations instead of one.
    """
    return right - wrong.mean(dim=1)


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
    written: str, num_tokens: int, source: str, soft_max_tokens: int
) -> dict[str, float]:
    """The terms that the description's text alone decides, unweighted, by the names in TEXT_TERMS.

    `written`: as sampled, closing tag included when it came. `source`: the train text behind the
    activation. `over_length` is in tokens, the others are 0 or 1, `evidence` is the share of the
    claims found in `source`.
    Example: "- Python test: frame, frame" without a tag -> unclosed 1, empty 0, repeated 1.
    """
    text, closed = parse_description(written)
    return {
        "unclosed": float(not closed),
        "empty": float(not text),
        "over_length": float(max(0, num_tokens - soft_max_tokens)),
        "repeated": float(repeats_item(text)),
        "evidence": claim_precision(text, source),
    }


def beginning_worth(text: str, source: str, settings: GRPOSettings) -> float:
    """What the text of a description's beginning earns beside its score: the evidence in it, less
    what it lists twice.

    Example: "- tokens: frame, index" with `index` in the source, weight .1 -> .05.
    """
    return settings.evidence_weight * claim_precision(
        text, source
    ) - settings.repeat_penalty * repeats_item(text)


class WrongActivations:
    """Draws, for one row of the activation bank, rows of other documents to compare its
    descriptions with.

    `documents`: the doc_id of every row of the bank; `near`: for every row the rows that are
    hardest to tell from it, of which `count_near` are drawn beside `count` of any. Raises
    ValueError when there are fewer than `count` rows outside the largest document, or fewer near
    rows than are to be drawn.
    """

    def __init__(
        self,
        documents: Sequence[str],
        count: int,
        near: Sequence[Sequence[int]] | None = None,
        count_near: int = 0,
    ) -> None:
        names, self._document = np.unique(np.asarray(documents), return_inverse=True)
        available = len(documents) - int(np.bincount(self._document).max()) if len(documents) else 0
        pool = len(near[0]) if near else 0
        if available < count or pool < count_near:
            raise ValueError(
                f"wrong activations: got {available} rows from other documents ({len(names)} train"
                f" documents) and {pool} near ones, expected at least {count} and {count_near}."
                " Lower --grpo.num-wrong and --grpo.num-near, or enlarge the corpus."
            )
        self._count, self._near, self._count_near = count, near, count_near

    def draw(self, row: int, seed: int, step: int) -> list[int]:
        """Different rows, those of any document first; a function of (seed, step, row) alone, and
        every step draws anew."""
        generator = np.random.default_rng(seed_of(seed, "wrong", str(step), str(row)))
        drawn: list[int] = []
        while len(drawn) < self._count:
            candidates = generator.integers(len(self._document), size=2 * self._count)
            drawn += [
                int(other)
                for other in dict.fromkeys(candidates.tolist())
                if self._document[other] != self._document[row] and other not in drawn
            ]
        near = (
            generator.choice(self._near[row], self._count_near, replace=False).tolist()
            if self._count_near
            else []
        )
        return drawn[: self._count] + near


def schedule_rows(
    num_rows: int, prompts_per_step: int, num_batches: int, seed: int
) -> list[list[int]]:
    """Which rows of the bank each batch of prompts describes: seeded passes over all rows, never
    one row twice in a batch.

    The schedule is written down before training, so that a resumed run meets the same batches in
    the same order.
    Raises ValueError when the bank is smaller than one batch.
    """
    if num_rows < prompts_per_step:
        raise ValueError(
            f"train activations: got {num_rows}, expected at least {prompts_per_step}, one for"
            " every prompt of a step. Lower --grpo.prompts-per-step or enlarge the corpus."
        )
    batches: list[list[int]] = []
    while len(batches) < num_batches:
        order = (
            np.random.default_rng(seed_of(seed, "schedule", str(len(batches))))
            .permutation(num_rows)
            .tolist()
        )
        last = num_rows - num_rows % prompts_per_step
        batches += [
            order[start : start + prompts_per_step] for start in range(0, last, prompts_per_step)
        ]
    return batches[:num_batches]
