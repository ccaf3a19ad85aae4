"""What one process of each kind asks of a cluster, from the configuration alone."""

from __future__ import annotations

from typing import Literal

from nla_ray.settings.config import ComputeConfig

Kind = Literal["trainer", "rollout", "scorer", "capture", "serve"]


def resources_of(compute: ComputeConfig, kind: Kind) -> dict[str, float]:
    """Resources of one process, as Ray Train's `resources_per_worker` takes them.

    What is not asked for is left out.

    >>> resources_of(ComputeConfig(trainer_cpus=8, trainer_gpus=1), "trainer")
    {'CPU': 8.0, 'GPU': 1.0}
    """
    cpus, gpus, custom = {
        "trainer": (compute.trainer_cpus, compute.trainer_gpus, compute.trainer_resource),
        "rollout": (compute.rollout_cpus, compute.rollout_gpus, compute.rollout_resource),
        "scorer": (compute.scorer_cpus, compute.scorer_gpus, compute.scorer_resource),
        "capture": (compute.capture_cpus, compute.capture_gpus, compute.capture_resource),
        "serve": (compute.serve_cpus, compute.serve_gpus, None),
    }[kind]
    resources = {"CPU": float(cpus)}
    if gpus:
        resources["GPU"] = float(gpus)
    if custom:
        resources[custom] = 1.0
    return resources


def gpus_of(compute: ComputeConfig, kind: Kind) -> int:
    """GPUs that one process of a kind computes on; 1 where it has a part of one, or none.

    >>> gpus_of(ComputeConfig(capture_gpus=2), "capture"), gpus_of(ComputeConfig(), "capture")
    (2, 1)
    """
    return max(1, int(resources_of(compute, kind).get("GPU", 0)))
