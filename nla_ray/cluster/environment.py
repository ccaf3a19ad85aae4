"""The environment variables of a job's processes.

Protects the rule that a process with a GPU gets no variable that is made for CPUs. Where no kind of
process books a GPU, all processes get the same ones, so that Ray can use a process again for
another purpose; elsewhere those without a GPU add theirs, and Ray starts them apart. The job's own
process and Ray Data's readers and writers then go without: they hold no model.
"""

from __future__ import annotations

from pathlib import Path

from nla_ray.cpu import door
from nla_ray.cpu.environment import cpu_environment
from nla_ray.settings.config import ComputeConfig
from nla_ray.settings.resources import Kind


def job_environment(compute: ComputeConfig, *, offline: bool = True) -> dict[str, str]:
    """What every process of a job gets: no telemetry, quiet libraries, no hub when `offline`.

    Where no kind of process books a GPU, the CPU's variables too.
    """
    environment = {
        # A process that has booked no GPU sees none: by itself Ray leaves all of them visible to
        # it, and torch would take the first.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if door.is_for_every_kind(compute):
        environment |= cpu_environment(compute.threads)
    return environment


def kind_environment(compute: ComputeConfig, kind: Kind) -> dict[str, str]:
    """What a process of one kind gets beyond its job's environment.

    The CPU's variables, where it books no GPU and another kind does.
    """
    if door.is_for_kind(compute, kind) and not door.is_for_every_kind(compute):
        return cpu_environment(compute.threads)
    return {}


def needs_hub(model: str) -> bool:
    """True when a base model is named by its hub id, and so may have to be downloaded."""
    return not (
        model.startswith(("embedded:", "package:"))
        or model.endswith(".gguf")
        or Path(model).exists()
    )
