"""DeepSpeed: its configuration for every trainer, and parameters that ZeRO-3 has spread.

The one module that mentions it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from nla_ray.cpu import door
from nla_ray.settings.config import ComputeConfig

_BUCKET_ELEMENTS = 2**23


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
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
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
