"""Rollout workers and the pools they live in: seeds, versions, groups, and killed actors."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from grpo_run import LORA, random_adapter

from nla_ray.base.adapters import adapter_state
from nla_ray.cluster.actors import MAX_RETRIES, ActorPool, SharedArray, split_evenly
from nla_ray.reinforce.rollouts import (
    RolloutRequest,
    RolloutWorker,
    WeightPublisher,
    generate,
    group_rows,
    train_request,
)
from nla_ray.settings.config import BaseConfig, ComputeConfig, GRPOSettings

BANK = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).numpy()
COMPUTE = ComputeConfig(threads=1, rollout_cpus=0.25)


@pytest.fixture(scope="module")
def worker(tiny_base: BaseConfig) -> RolloutWorker:
    worker = RolloutWorker(tiny_base, LORA, 1, BANK, BANK)
    worker.load_weights(adapter_state(random_adapter(tiny_base)), 5)
    return worker


def request(rows: list[int], step: int = 0) -> RolloutRequest:
    return train_request(GRPOSettings(group_size=3, max_new_tokens=6), rows, step)


def test_rollouts_are_ordered_by_row_and_record_row_and_version(worker: RolloutWorker) -> None:
    rollouts = worker.sample(request([7, 2]))
    assert [rollout.row for rollout in rollouts] == [7, 7, 7, 2, 2, 2]
    assert {rollout.weight_version for rollout in rollouts} == {5}
    assert all(len(rollout.log_probs) == len(rollout.token_ids) <= 6 for rollout in rollouts)


def test_rollouts_do_not_depend_on_which_actor_makes_them(worker: RolloutWorker) -> None:
    together = worker.sample(request([7, 2, 9]))
    apart = [rollout for rows in ([9], [7, 2]) for rollout in worker.sample(request(rows))]
    tokens = {(rollout.row, index % 3): rollout.token_ids for index, rollout in enumerate(apart)}
    assert [rollout.token_ids for rollout in together] == [
        tokens[row, sample] for row in (7, 2, 9) for sample in range(3)
    ]


def test_samples_of_a_group_differ_and_every_step_draws_anew(worker: RolloutWorker) -> None:
    first, second = worker.sample(request([4])), worker.sample(request([4], step=1))
    assert len({tuple(rollout.token_ids) for rollout in first}) == 3
    assert [rollout.token_ids for rollout in first] != [rollout.token_ids for rollout in second]


def test_rows_are_split_into_contiguous_parts_of_nearly_equal_length() -> None:
    assert split_evenly([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]
    assert split_evenly([1, 2], 3) == [[1], [2]]


def test_whole_groups_are_found_and_a_broken_group_is_an_error() -> None:
    assert group_rows([4, 4, 9, 9], 2) == [4, 9]
    with pytest.raises(RuntimeError, match="expected each 2 times in a row"):
        group_rows([4, 9, 4, 9], 2)


# Pools --------------------------------------------------------------------------------------------


def squarer() -> type:
    """A worker class that owes nothing to earlier calls, and dies when it is asked to.

    It is made in a function: actors cannot import this file.
    """

    class Squarer:
        def square(self, value: int, log: str = "", seconds: float = 0.0) -> tuple[int, int]:
            if log:
                Path(log).write_text(f"{os.getpid()}\n")
            time.sleep(seconds)
            return value * value, os.getpid()

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    return Squarer


@pytest.mark.parametrize(
    "actors, ranks, shares",
    [
        (2, 2, [[0], [1]]),
        (1, 2, [[0], [0]]),
        (6, 4, [[0], [1, 2], [3], [4, 5]]),
        (3, 1, [[0, 1, 2]]),
    ],
)
def test_every_trainer_worker_has_actors_of_its_own_where_there_are_enough(
    actors: int, ranks: int, shares: list[list[int]]
) -> None:
    pool = ActorPool.__new__(
        ActorPool
    )  # without Ray: how actors are shared out does not depend on what they are
    pool._actors = list(range(actors))
    assert [pool.part(rank, ranks)._actors for rank in range(ranks)] == shares
    assert len(pool) == actors


def test_a_call_whose_actor_is_killed_is_answered_by_its_successor(
    ray_cluster: None, tmp_path: Path
) -> None:
    pool = ActorPool("rollout", squarer(), (), count=1, compute=COMPUTE)
    log = tmp_path / "pids"
    calls = pool.submit("square", [(3, str(log), 1.0)])
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline, "the actor did not start"
        time.sleep(0.05)
    killed = int(log.read_text())
    os.kill(killed, signal.SIGKILL)
    [(value, successor)] = pool.collect(calls)
    assert value == 9 and successor != killed
    pool.close()


def test_a_call_that_kills_every_actor_ends_in_one_clear_error(ray_cluster: None) -> None:
    pool = ActorPool("rollout", squarer(), (), count=1, compute=COMPUTE)
    with pytest.raises(
        RuntimeError,
        match=f"rollout actors: got one that died {MAX_RETRIES + 1} times under one call",
    ):
        pool.collect(pool.submit("die", [()]))
    pool.close()


def test_a_killed_rollout_actor_gets_the_current_weights_again(
    ray_cluster: None, tiny_base: BaseConfig, worker: RolloutWorker
) -> None:
    import psutil

    bank = SharedArray(BANK)
    pool = ActorPool(
        "rollout", RolloutWorker, (tiny_base, LORA, 1, bank, bank), count=1, compute=COMPUTE
    )
    weights = WeightPublisher().publish(random_adapter(tiny_base), 5)
    before = generate(pool, request([7, 2]), weights).rollouts
    [pid] = [
        actor.pid
        for actor in psutil.process_iter(["pid", "cmdline"])
        if is_own_actor(actor, "RolloutWorker")
    ]
    os.kill(pid, signal.SIGKILL)
    after = generate(pool, request([7, 2]), weights).rollouts
    assert after == before == worker.sample(request([7, 2]))
    pool.close()


def is_own_actor(process, name: str) -> bool:
    """Whether a process is an actor of this name under this test session's Ray."""
    return f"ray::{name}" in " ".join(process.info["cmdline"] or []) and any(
        parent.pid == os.getpid() for parent in process.parents()
    )
