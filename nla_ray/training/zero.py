"""DeepSpeed: its configuration for every trainer, and what ZeRO has spread over the workers, whole.

The one module that mentions it. Without DeepSpeed the functions on an optimizer are those of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.cpu import door
from nla_ray.settings.config import ComputeConfig

_BUCKET_ELEMENTS = 2**23
_PARTS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""Where ZeRO-2 and ZeRO-3 keep a worker's parts of the float32 weights."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every weight."""


def deepspeed_config(compute: ComputeConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration for `TrainingArguments(deepspeed=...)`; None trains without it.

    On a CPU nothing is compiled.
    """
    if compute.zero_stage == 0:
        return None
    on_cpu = door.is_for_kind(compute, "trainer")
    if on_cpu:
        _skip_shared_memory_collectives()
    zero: dict[str, Any] = {
        "stage": compute.zero_stage,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        "overlap_comm": not on_cpu,
    }
    if compute.zero_stage == 3:
        # The library gathers what is below the threshold into buffers of ONE type; base and adapter
        # have two.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _skip_shared_memory_collectives() -> None:
    """Spare CPU workers an op that DeepSpeed would compile when it starts.

    Its inference calls the op, its training never does. It needs a C++ compiler and half a minute
    on first use, and a build that is killed leaves a lock for which every later run would wait
    without end.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make parameters that ZeRO-3 has spread over the workers whole, for a with-block.

    All ranks must enter.
    """
    parameters = list(parameters)
    spread = any(hasattr(parameter, "ds_id") for parameter in parameters)
    if not spread:
        context = nullcontext()
    else:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(parameters)
    with context:
        yield


# An optimizer's state, whole ----------------------------------------------------------------------


def steps_taken(optimizer: Any) -> int:
    """Steps of an AdamW that has stepped, alone or inside ZeRO's optimizer."""
    states = _adamw(optimizer).state.values()
    return int(next(iter(states))["step"])


def begin_at(optimizer: Any, step: int) -> None:
    """Give an AdamW that has not stepped the state of one that has: `step`, and moments of zero."""
    adamw = _adamw(optimizer)
    on_device = adamw.defaults.get("fused") or adamw.defaults.get("capturable")
    for tensor in _stepped_tensors(optimizer):
        count = torch.tensor(float(step), device=tensor.device if on_device else "cpu")
        adamw.state[tensor] = {
            "step": count,
            **{name: torch.zeros_like(tensor) for name in MOMENTS},
        }
    link_moments(optimizer)


def link_moments(optimizer: Any) -> None:
    """Let ZeRO-2 find the moments of all weights, before they are read or written.

    By itself it looks for them once, after the step of its first group: it misses those of others.
    """
    if hasattr(optimizer, _PARTS[0]):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def read_weight(parameter: nn.Parameter) -> Tensor:
    """A trained weight in float32, whole. All ranks must call it."""
    if not _is_spread(parameter):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def read_moment(optimizer: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """One of the MOMENTS of a weight, whole; `link_moments` first. All ranks must call it."""
    if not _is_spread(parameter):
        return optimizer.state[parameter][name]
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, name)


@torch.no_grad()
def write_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace a trained weight, here and in what ZeRO holds of it on this rank."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_local_fp32_param

        part = _own_part(parameter, value)
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.copy_(part)
        return
    parameter.copy_(value)
    if _is_spread(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)


@torch.no_grad()
def write_moment(optimizer: Any, parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Replace one of the MOMENTS of a weight, after `begin_at`; of it what this rank holds."""
    value = value.to(parameter.device)
    if not _is_spread(parameter):
        optimizer.state[parameter][name].copy_(value)
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), name)
    else:
        safe_set_full_optimizer_state(parameter, value, name)


def _adamw(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer, which ZeRO's holds."""
    return optimizer.optimizer if any(hasattr(optimizer, name) for name in _PARTS) else optimizer


def _stepped_tensors(optimizer: Any) -> list[Tensor]:
    """What AdamW steps on in this process: the parameters, or under ZeRO this rank's parts."""
    for name in _PARTS:
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_spread(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps float32 weight and moments of a parameter in parts, one a rank."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole value as ZeRO-3 cuts it: flat, equal parts, zeros at the end."""
    part = parameter.ds_tensor.numel()
    ranks = torch.distributed.get_world_size(parameter.ds_process_group)
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    padded = torch.zeros(part * ranks, dtype=torch.float32, device=value.device)
    padded[: value.numel()] = value.flatten()
    return padded[rank * part : (rank + 1) * part]
