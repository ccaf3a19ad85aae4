"""What a rollout actor holds and does, and how the trainer's current adapter reaches it.

A rollout actor holds one loaded base, a generation engine with one adapter over it, and the
activation banks of train and validation, which it only reads. It holds no optimiser, no scorer and
no text. The trainer publishes its adapter under a version. Every request names the version that it
is to be sampled with; an actor that has another version, or none after a restart, fetches it first.
Sampling is seeded by (seed, step, row, sample). Protects the rule that neither the number of
actors, nor their deaths, nor a resume changes a token.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from nla_ray.base.adapters import adapter_state
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import injection_prompt
from nla_ray.cluster.actors import ActorPool, SharedArray, shared_tensor, split_evenly
from nla_ray.description.engines.interface import make_engine
from nla_ray.description.record import Description
from nla_ray.run.identity import seed_of
from nla_ray.settings.config import BaseConfig, GRPOSettings, LoraSettings
from nla_ray.training.zero import gathered

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


MAX_SLOTS = 128
"""Rows that one engine decodes at once."""


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """What a call asks of a rollout worker.

    Example: RolloutRequest(split="train", rows=[17, 4], group_size=8, temperature=1.0,
    max_new_tokens=64, seed=5) gives 16 rollouts: eight of row 17, then eight of row 4.
    """

    split: Literal["train", "validation"]
    rows: list[int]
    """Rows of that split's activation bank, each prefilled once."""
    group_size: int
    temperature: float
    """0 is greedy."""
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """An adapter in the object store."""

    publisher: str
    """Tells the adapters of a restarted trainer from those before."""
    version: int
    """The optimiser step that the adapter stands at."""
    reference: Any
    """ray.ObjectRef of {name: tensor} as `adapter_state` gives it.

    It lives as long as the publisher holds it.
    """


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The answer to one request, with the seconds that loading weights and generating took."""

    rollouts: list[Description]
    load_seconds: float
    generate_seconds: float


class RolloutWorker:
    """The base, a generation engine and the activation banks in one process; a plain class."""

    def __init__(
        self,
        base: BaseConfig,
        lora: LoraSettings,
        threads: int,
        train: SharedArray | np.ndarray,
        validation: SharedArray | np.ndarray,
        num_gpus: int = 1,
    ) -> None:
        """`train`, `validation`: what is injected, float32, only ever read.

        Activations [rows, d_model], or [rows, vectors, d_model]. `num_gpus`: as `make_engine` takes
        it.
        """
        torch.set_num_threads(threads)
        tokenizer = load_tokenizer(base)
        self.engine = make_engine(
            _load_base(base, num_gpus),
            tokenizer,
            injection_prompt(tokenizer, base),
            base.injection_norm,
            max_slots=MAX_SLOTS,
            lora=lora,
            chosen=base.engine,
            num_gpus=num_gpus,
        )
        self._banks = {"train": shared_tensor(train), "validation": shared_tensor(validation)}
        self._held: tuple[str, int] | None = None

    def generate(self, request: RolloutRequest, weights: PublishedWeights) -> RolloutBatch:
        """The rollouts of a request under exactly these weights, ordered by (row, sample)."""
        started = time.perf_counter()
        if self._held != (weights.publisher, weights.version):
            import ray

            self.load_weights(ray.get(weights.reference), weights.version)
            self._held = (weights.publisher, weights.version)
        loaded = time.perf_counter()
        rollouts = self.sample(request)
        return RolloutBatch(
            rollouts=rollouts,
            load_seconds=loaded - started,
            generate_seconds=time.perf_counter() - loaded,
        )

    def load_weights(self, state: dict[str, torch.Tensor], version: int) -> None:
        """Replace the engine's adapter."""
        self.engine.load_weights(state, version)

    def sample(self, request: RolloutRequest) -> list[Description]:
        """The rollouts of a request under the weights that are loaded."""
        activations = self._banks[request.split][request.rows]
        return self.engine.generate(
            activations,
            group_size=request.group_size,
            temperature=request.temperature,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            rows=request.rows,
        )


def _load_base(base: BaseConfig, num_gpus: int) -> nn.Module:
    """The base in its place; in host memory where no single GPU is there to hold it.

    There it has the type that vLLM computes in on the GPUs: it fills prompts and checks a few
    tokens.
    """
    if num_gpus == 1:
        return load_backbone(base)
    on_host = load_backbone(dataclasses.replace(base, device="cpu"))
    return on_host.to(getattr(torch, base.dtype))


class WeightPublisher:
    """Puts the trainer's current adapter into the object store, once a version."""

    def __init__(self) -> None:
        self._publisher = uuid.uuid4().hex[:8]
        self._latest: PublishedWeights | None = None

    def publish(self, model: nn.Module, version: int) -> PublishedWeights:
        """The adapter at optimiser step `version`.

        All ranks call it: under ZeRO-3 the weights are gathered first.
        """
        import ray

        if self._latest is None or self._latest.version != version:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with gathered(trained):
                state = adapter_state(model)
            self._latest = PublishedWeights(
                publisher=self._publisher, version=version, reference=ray.put(state)
            )
        return self._latest


def train_request(settings: GRPOSettings, rows: list[int], step: int) -> RolloutRequest:
    """The groups of one training step."""
    return RolloutRequest(
        split="train",
        rows=rows,
        group_size=settings.group_size,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=seed_of(settings.seed, "rollout", str(step)),
    )


def generate(pool: ActorPool, request: RolloutRequest, weights: PublishedWeights) -> RolloutBatch:
    """A request shared out over the pool, a contiguous part of its rows to each actor.

    Seconds are those of the slowest actor.
    """
    calls = [
        (dataclasses.replace(request, rows=rows), weights)
        for rows in split_evenly(request.rows, len(pool))
    ]
    batches: list[RolloutBatch] = pool.collect(pool.submit("generate", calls))
    return RolloutBatch(
        rollouts=[rollout for batch in batches for rollout in batch.rollouts],
        load_seconds=max(batch.load_seconds for batch in batches),
        generate_seconds=max(batch.generate_seconds for batch in batches),
    )


def group_rows(rows: Sequence[int], group_size: int) -> list[int]:
    """The row of each group.

    Raises RuntimeError when the rows do not come in whole groups: rollouts would be compared across
    activations.

    >>> group_rows([4, 4, 9, 9], group_size=2)
    [4, 9]
    """
    groups = list(rows[::group_size])
    if [row for row in groups for _ in range(group_size)] != list(rows):
        raise RuntimeError(
            f"groups: got rows {list(rows[: 2 * group_size])}..., expected each {group_size} times"
            " in a row. The trainer's sampler has changed; TRL's minor version is pinned for this"
            " reason."
        )
    return groups
