"""Whether the cluster has room for what a stage starts, and where one process is placed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nla_ray.cluster.environment import kind_environment
from nla_ray.settings.config import ComputeConfig, RunConfig
from nla_ray.settings.resources import Kind, resources_of

_MANY = 100
"""Nodes that a cluster without a limit is taken to have."""


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
    if environment := kind_environment(compute, kind):
        options["runtime_env"] = {"env_vars": environment}
    return options


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


def require_resources(demands: Iterable[Demand]) -> None:
    """Check, before anything starts, that all demands fit into the cluster at once.

    Nodes that the cluster may still add count. Raises ValueError that says what is missing: a
    request that can never be met would wait for ever.
    """
    wanted = list(demands)
    nodes = _node_capacities()
    unmet = unmet_demands(wanted, nodes)
    if unmet:
        total: dict[str, float] = {}
        for node in nodes:
            for name, amount in node.items():
                total[name] = total.get(name, 0.0) + amount
        raise ValueError(
            f"cluster resources: got {len(nodes)} nodes with {_amounts(total)} in all, expected"
            f" room for {'; '.join(map(str, wanted))} at once; no room is left for"
            f" {'; '.join(map(str, unmet))}. Add nodes, or ask for less with --compute.* or a"
            " smaller number of actors."
        )


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


def _amounts(resources: dict[str, float]) -> str:
    """`8 CPU, 1 GPU`: what Ray adds by itself is left out."""
    shown = [
        f"{amount:g} {name}"
        for name, amount in sorted(resources.items())
        if not name.startswith(("node:", "accelerator_type:"))
        and name not in ("memory", "object_store_memory")
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
    require_resources([demand(config.compute, kind)])
    options = worker_options(config.compute, kind)
    ray.get(ray.remote(work).options(max_retries=3, **options).remote(config))
