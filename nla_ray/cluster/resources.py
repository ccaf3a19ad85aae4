"""Whether the cluster has room for what a stage starts, and where one process is placed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nla_ray.cluster.environment import kind_environment
from nla_ray.settings.config import ComputeConfig, RunConfig
from nla_ray.settings.resources import Kind, resources_of


def worker_options(compute: ComputeConfig, kind: Kind) -> dict[str, Any]:
    """What one process of a kind is given, as arguments of `.options(...)`, `map_batches(...)` or
    `ray_actor_options`."""
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
    """`count` processes that must run at the same time, and what one of them asks for.

    Example: Demand(name="trainer", count=4, resources={"CPU": 8.0, "GPU": 1.0, "trainer_node":
    1.0})
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
    """Check, before anything starts, that all demands fit into the cluster at once, nodes it may
    still add included.

    Raises ValueError that says what is missing: a request that can never be met would wait for
    ever.
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
    """The part of the demands that finds no place when they are laid into the nodes, the largest
    first."""
    free = [dict(node) for node in nodes]
    unmet = []
    for wanted in sorted(
        demands, key=lambda one: (-one.resources.get("GPU", 0.0), -one.resources.get("CPU", 0.0))
    ):
        missing = 0
        for _ in range(wanted.count):
            node = next(
                (
                    node
                    for node in free
                    if all(
                        node.get(name, 0.0) >= amount - 1e-9
                        for name, amount in wanted.resources.items()
                    )
                ),
                None,
            )
            if node is None:
                missing += 1
                continue
            for name, amount in wanted.resources.items():
                node[name] -= amount
        if missing:
            unmet.append(Demand(name=wanted.name, count=missing, resources=wanted.resources))
    return unmet


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
            present = sum(
                all(node.get(name, 0) >= amount for name, amount in group.resources.items())
                for node in nodes
            )
            more = (100 if group.max_count < 0 else group.max_count) - present
            nodes += [
                {name: float(amount) for name, amount in group.resources.items()}
                for _ in range(max(0, more))
            ]
    return nodes


def _amounts(resources: dict[str, float]) -> str:
    shown = {
        name: amount
        for name, amount in resources.items()
        if not name.startswith(("node:", "accelerator_type:"))
        and name not in ("memory", "object_store_memory")
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"


def run_placed(config: RunConfig, kind: Kind, work: Callable[[RunConfig], None]) -> None:
    """`work(config)` in one Ray process that is placed like one of `kind`, or in this process when
    Ray is not there.

    Raises ValueError when the cluster has no room for it. A process that dies is started again,
    three times at most.
    """
    import ray

    if not ray.is_initialized():
        work(config)
        return
    require_resources([demand(config.compute, kind)])
    ray.get(
        ray.remote(work)
        .options(max_retries=3, **worker_options(config.compute, kind))
        .remote(config)
    )
