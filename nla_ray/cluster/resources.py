"""Whether the cluster has room for what a stage starts, and where one process is placed.

Protects the rule that nothing waits in silence: what can never find room is an error, and what has
to wait for room says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nla_ray.cluster.environment import kind_environment
from nla_ray.run.log import get_logger
from nla_ray.settings.config import ComputeConfig, RunConfig
from nla_ray.settings.resources import Kind, resources_of

logger = get_logger(__name__)

_MANY = 100
"""Nodes that a cluster without a limit is taken to have."""
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 10.0, 300.0
"""How long a wait for room lasts before it is told of, and between two words about it."""


def worker_options(compute: ComputeConfig, kind: Kind) -> dict[str, Any]:
    """What one process of a kind is given, as arguments of `.options(...)` and `map_batches(...)`.

    Ray Serve takes them as `ray_actor_options`.
    """
    resources = resources_of(compute, kind)
    options: dict[str, Any] = {
        "num_cpus": resources.pop("CPU"),
        "num_gpus": resources.pop("GPU", 0.0),
        "resources": resources,
    }
    runtime: dict[str, Any] = {}
    if environment := kind_environment(compute, kind):
        runtime["env_vars"] = environment
    if kind == "rollout" and compute.rollout_python is not None:
        runtime["py_executable"] = compute.rollout_python
    return options | ({"runtime_env": runtime} if runtime else {})


@dataclass(frozen=True, kw_only=True)
class Demand:
    """`count` processes that must run at the same time, and what each of them asks for.

    >>> str(Demand(name="trainer", count=4, resources={"CPU": 8.0, "GPU": 1.0}))
    '4 x trainer (8 CPU, 1 GPU each)'
    """

    name: str
    count: int
    resources: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.count} x {self.name} ({_amounts(self.resources)} each)"


def demand(compute: ComputeConfig, kind: Kind, count: int = 1) -> Demand:
    """The demand of `count` processes of one kind."""
    return Demand(name=kind, count=count, resources=resources_of(compute, kind))


def require_resources(compute: ComputeConfig, demands: Iterable[Demand]) -> None:
    """Return when all demands fit into the cluster at once, before anything starts.

    Nodes that the cluster may still add count. Where other jobs hold the room, this waits, and says
    so. Raises ValueError that says what is missing: at once where the cluster is too small, and
    after `compute.wait_seconds` where it is busy.
    """
    wanted = list(demands)
    nodes = _node_capacities()
    unmet = unmet_demands(wanted, nodes)
    if unmet:
        raise ValueError(
            f"cluster resources: got {len(nodes)} nodes with {_amounts(_total(nodes))} in all,"
            f" expected room for {_listed(wanted)} at once; no room is left for {_listed(unmet)}."
            " Add nodes, or ask for less with --compute.* or a smaller number of actors."
        )
    if unmet_demands(wanted, _free_resources()):
        _wait_for_room(wanted, compute.wait_seconds)


def _wait_for_room(wanted: list[Demand], wait_seconds: float | None) -> None:
    """Return when the demands fit into what is free; raise ValueError after `wait_seconds`.

    A placement group asks for the room: a cluster that may add nodes adds them for it.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [dict(demand.resources) for demand in wanted for _ in range(demand.count)]
    group = placement_group(bundles)
    started = time.monotonic()
    limit = float("inf") if wait_seconds is None else wait_seconds
    waited, next_word = 0.0, _FIRST_WORD_SECONDS
    try:
        while not group.wait(max(0.0, min(next_word, limit) - waited)):
            waited = time.monotonic() - started
            message = busy_message(wanted, _free_resources(), waited, wait_seconds)
            if waited >= limit:
                raise ValueError(message)
            if waited >= next_word:
                logger.info("%s", message)
                next_word = waited + _NEXT_WORD_SECONDS
    finally:
        remove_placement_group(group)


def busy_message(
    wanted: Iterable[Demand],
    free: Iterable[dict[str, float]],
    waited: float,
    wait_seconds: float | None,
) -> str:
    """What is wanted, what is free, and how long it is waited for; seconds.

    >>> wanted = [Demand(name="actor", count=3, resources={"CPU": 1.0})]
    >>> print(busy_message(wanted, [{"CPU": 2.0}], 10.2, None))  # doctest: +NORMALIZE_WHITESPACE
    cluster resources: got a busy cluster with 2 CPU free, expected room for 3 x actor (1 CPU each)
    at once; waiting for 10 s already, as long as it takes. --compute.wait-seconds sets an end.
    """
    got = (
        f"cluster resources: got a busy cluster with {_amounts(_total(free))} free, expected room"
        f" for {_listed(wanted)} at once"
    )
    if wait_seconds is None:
        return (
            f"{got}; waiting for {waited:.0f} s already, as long as it takes."
            " --compute.wait-seconds sets an end."
        )
    if waited < wait_seconds:
        return f"{got}; waiting for {waited:.0f} s of {wait_seconds:g} s already."
    return (
        f"{got} within {wait_seconds:g} s. Run the command again when other jobs have ended, wait"
        " longer with --compute.wait-seconds, or ask for less with --compute.*."
    )


def _listed(demands: Iterable[Demand]) -> str:
    return "; ".join(map(str, demands))


def _total(nodes: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def unmet_demands(demands: Iterable[Demand], nodes: Iterable[dict[str, float]]) -> list[Demand]:
    """The part of the demands that finds no room in the nodes; the largest are laid in first.

    >>> unmet_demands([Demand(name="actor", count=3, resources={"CPU": 1.0})], [{"CPU": 2.0}])
    [Demand(name='actor', count=1, resources={'CPU': 1.0})]
    """
    free = [dict(node) for node in nodes]
    unmet = []
    for wanted in sorted(demands, key=_size, reverse=True):
        missing = 0
        for _ in range(wanted.count):
            node = next((node for node in free if _has_room(node, wanted.resources)), None)
            if node is None:
                missing += 1
                continue
            for name, amount in wanted.resources.items():
                node[name] -= amount
        if missing:
            unmet.append(Demand(name=wanted.name, count=missing, resources=wanted.resources))
    return unmet


def _size(wanted: Demand) -> tuple[float, float]:
    return wanted.resources.get("GPU", 0.0), wanted.resources.get("CPU", 0.0)


def _has_room(node: dict[str, float], resources: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount - 1e-9 for name, amount in resources.items())


def _node_capacities() -> list[dict[str, float]]:
    """Resources of every node that is alive or that the autoscaler may start.

    Source: `get_cluster_config` is what Ray Train itself asks before it waits for a placement
    group.
    """
    import ray
    from ray._private.state import state

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()
    if config is not None:
        for group in config.node_group_configs:
            resources = {name: float(amount) for name, amount in group.resources.items()}
            num_present = sum(_has_room(node, resources) for node in nodes)
            most = _MANY if group.max_count < 0 else group.max_count
            nodes += [dict(resources) for _ in range(most - num_present)]
    return nodes


def _free_resources() -> list[dict[str, float]]:
    """What is free on every node that is alive; a moment old."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def _amounts(resources: dict[str, float]) -> str:
    """`8 CPU, 1 GPU`: what Ray adds by itself is left out."""
    shown = [
        f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "accelerator_type:"))
        and name not in ("memory", "object_store_memory")
        and "_group_" not in name  # what a placement group has booked
    ]
    return ", ".join(shown) or "nothing"


def run_placed(config: RunConfig, kind: Kind, work: Callable[[RunConfig], None]) -> None:
    """`work(config)` in one Ray process that is placed like a process of `kind`.

    Without Ray it runs in this process. Raises ValueError when the cluster has no room for it. A
    process that dies is started again, three times at most.
    """
    import ray

    if not ray.is_initialized():
        work(config)
        return
    require_resources(config.compute, [demand(config.compute, kind)])
    options = worker_options(config.compute, kind)
    ray.get(ray.remote(work).options(max_retries=3, **options).remote(config))
