"""What a scorer actor holds and does: the scores of rollouts.

It holds one loaded base with two adapters (the reward scorer, and the judge for the monitor alone)
and the train bank of activations. Protects two rules: a description is reconstructed ONCE and
compared with its right activation and with every wrong one; the judge never answers a training
request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nla_ray.cluster.actors import ActorPool, SharedArray, shared_tensor, split_evenly
from nla_ray.run.artifact import Run
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.scorer import Scorer, ScorerName
from nla_ray.settings.config import RunConfig

if TYPE_CHECKING:
    import numpy as np
    from ray import ObjectRef


@dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """Descriptions with the train row each is about and the rows it must not fit.

    Example: ScoringRequest(descriptions=["- a licence"], rows=[17], wrong_rows=[[3, 98]])
    """

    descriptions: list[str]
    rows: list[int]
    wrong_rows: list[list[int]]
    """The same number of wrong rows for each description; 0 when nothing is contrasted."""


@dataclass(frozen=True, kw_only=True)
class ScoreBatch:
    """The reward scorer's cosines, raw and centred, and the seconds it took."""

    right: Tensor
    """[n] raw cosines with the right activation."""
    wrong: Tensor
    """[n, k]."""
    centred_right: Tensor
    """[n]."""
    centred_wrong: Tensor
    """[n, k]."""
    seconds: float

    @classmethod
    def join(cls, batches: Sequence[ScoreBatch]) -> ScoreBatch:
        """The batches in a row; seconds are those of the slowest."""
        return cls(
            right=torch.cat([batch.right for batch in batches]),
            wrong=torch.cat([batch.wrong for batch in batches]),
            centred_right=torch.cat([batch.centred_right for batch in batches]),
            centred_wrong=torch.cat([batch.centred_wrong for batch in batches]),
            seconds=max(batch.seconds for batch in batches),
        )


class ScorerWorker:
    """Reward scorer, judge scorer and the train bank in one process; a plain class."""

    def __init__(self, config: RunConfig, train: SharedArray | np.ndarray) -> None:
        """`train`: activation bank [rows, d_model] float32, only ever read."""
        torch.set_num_threads(config.compute.threads)
        self._train = shared_tensor(train)
        run = Run(config)
        self._reward = self._load(run, "reward_scorer", None)
        self._judge = self._load(run, "judge_scorer", self._reward.reconstructor.model)

    @staticmethod
    def _load(run: Run, name: ScorerName, model) -> Scorer:
        with run.local_copy(name, run.require(name)) as folder:
            reconstructor = Reconstructor.load(run.config.base, folder, adapter=name, model=model)
        return Scorer(reconstructor, getattr(run.config, name).batch_size)

    def score(self, request: ScoringRequest) -> ScoreBatch:
        """The reward scorer's answer to a training request."""
        started = time.perf_counter()
        right = self._train[request.rows]
        wrong = self._train[torch.tensor(request.wrong_rows, dtype=torch.int64)]
        scores = self._reward.score(request.descriptions, right, wrong)
        return ScoreBatch(
            right=scores.right,
            wrong=scores.wrong,
            centred_right=scores.centred_right,
            centred_wrong=scores.centred_wrong,
            seconds=time.perf_counter() - started,
        )

    def reconstruct(self, scorer: ScorerName, descriptions: list[str]) -> Tensor:
        """Reconstructions [n, d_model] by either scorer, for the monitor."""
        chosen = self._reward if scorer == "reward_scorer" else self._judge
        return chosen.reconstructor.reconstruct(descriptions, chosen.batch_size)


def submit_scores(pool: ActorPool, request: ScoringRequest) -> list[ObjectRef]:
    """Start scoring, shared out over the pool; `ScoreBatch.join(pool.collect(...))` ends it.

    The trainer works on meanwhile.
    """
    calls = []
    for part in split_evenly(range(len(request.descriptions)), len(pool)):
        descriptions = [request.descriptions[index] for index in part]
        rows = [request.rows[index] for index in part]
        wrong_rows = [request.wrong_rows[index] for index in part]
        calls.append((ScoringRequest(descriptions=descriptions, rows=rows, wrong_rows=wrong_rows),))
    return pool.submit("score", calls)


def reconstruct(pool: ActorPool, scorer: ScorerName, descriptions: list[str]) -> Tensor:
    """Reconstructions [n, d_model] by either scorer, shared out over the pool."""
    calls = pool.submit(
        "reconstruct", [(scorer, part) for part in split_evenly(descriptions, len(pool))]
    )
    return torch.cat(pool.collect(calls))
