"""Who enters this room: models that lie on a CPU, and processes that book no GPU.

Whoever uses a kernel, a variable or a setting of this room asks here first. Imports no torch: a job
asks before anything heavy is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from nla_ray.settings.config import ComputeConfig
from nla_ray.settings.resources import Kind, resources_of

if TYPE_CHECKING:
    import torch


def is_for_device(device: torch.device) -> bool:
    """Whether a model on `device` runs what this room holds."""
    return device.type == "cpu"


def is_for_kind(compute: ComputeConfig, kind: Kind) -> bool:
    """Whether a process of this kind does: it books no GPU.

    >>> is_for_kind(ComputeConfig(trainer_gpus=1), "trainer")
    False
    >>> is_for_kind(ComputeConfig(trainer_gpus=1), "scorer")
    True
    """
    return "GPU" not in resources_of(compute, kind)


def is_for_every_kind(compute: ComputeConfig) -> bool:
    """Whether every process of a run does, the job itself too.

    >>> is_for_every_kind(ComputeConfig(trainer_gpus=1))
    False
    """
    return all(is_for_kind(compute, kind) for kind in get_args(Kind))
