"""Which processes may have several GPUs, and for which bases: jobs and plans ask before they begin.

Capture spreads blocks over its GPUs, and vLLM its copy of a base over those of a rollout process.
Every other process computes on one. It imports no torch.
"""

from __future__ import annotations

from typing import Any

from nla_ray.base.config_files import known_config
from nla_ray.base.families import quantiser_of
from nla_ray.settings.config import ComputeConfig, RunConfig, require


def check_gpus(config: RunConfig) -> None:
    """Raise ValueError for several GPUs a process that would use one of them.

    A base that is not on this machine yet is asked by the stage (`check_gpus_of_base`).
    """
    compute, engine = config.compute, config.base.engine
    for_one = {
        "trainer": "A base that one GPU does not hold is spread over workers: set"
        " --compute.trainer-gpus 1 --compute.trainer-workers N --compute.zero-stage 3.",
        "scorer": "Set --compute.scorer-gpus 1.",
        "serve": "Set --compute.serve-gpus 1.",
    }
    if engine != "vllm":
        for_one["rollout"] = (
            f"The engine {engine!r} generates on one: set --base.engine vllm, which spreads a base"
            " over several, or --compute.rollout-gpus 1."
        )
    if config.capture.needs_answers:
        for_one["capture"] = (
            "The whole base answers first, on one GPU: set --compute.capture-gpus 1, or positions"
            " that need no answer."
        )
    for kind, remedy in for_one.items():
        setting, gpus = f"compute.{kind}_gpus", getattr(compute, f"{kind}_gpus")
        require(gpus <= 1, setting, gpus, "at most 1", remedy)
    for kind in ("rollout", "capture"):
        setting, gpus = f"compute.{kind}_gpus", getattr(compute, f"{kind}_gpus")
        expected = "a part of a GPU or a whole number of them"
        require(gpus <= 1 or gpus == int(gpus), setting, gpus, expected, "Set the nearest one.")
    known = known_config(config.base.model)
    if known is not None:
        check_gpus_of_base(known, compute)


def check_gpus_of_base(base: Any, compute: ComputeConfig) -> None:
    """Raise ValueError for a base that cannot be spread over the GPUs of one process.

    `base`: its configuration, transformers' own or that of `known_config`. Weights of few bits are
    made where they stay; of the heads, which vLLM shares out, each GPU gets as many.
    """
    settings = {
        "compute.capture_gpus": compute.capture_gpus,
        "compute.rollout_gpus": compute.rollout_gpus,
    }
    for setting, gpus in settings.items():
        if gpus > 1 and quantiser_of(base) is not None:
            raise ValueError(
                f"{setting}: got {gpus:g} for a base of quantised weights, expected at most 1: only"
                f" plain weights are spread over GPUs. Set --{setting.replace('_', '-')} 1, or take"
                " the plain base."
            )
    gpus, heads = compute.rollout_gpus, base.num_attention_heads
    if gpus > 1 and heads % gpus:
        raise ValueError(
            f"compute.rollout_gpus: got {gpus:g} for a base of {heads} attention heads, expected a"
            " number that divides them. Set --compute.rollout-gpus."
        )
