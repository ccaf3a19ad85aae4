"""In which type training multiplies where a configuration says `auto`, and a CPU what is bfloat16.

It asks the resources that trainers book and the processor, without torch: a plan and a driver
answer for workers that have not started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nla_ray.settings.config import RunConfig

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Instructions that multiply in bfloat16, as Linux names them: two of x86, one of ARM."""


def training_dtype(config: RunConfig) -> Literal["float32", "bfloat16"]:
    """The type that `base.training_dtype` asks for; `auto`: bfloat16 where it is fast.

    That is on every GPU, and on a processor with instructions for it: of workers on CPUs the
    machine of the driver decides for all.
    """
    if config.base.training_dtype != "auto":
        return config.base.training_dtype
    on_gpu = config.base.device != "cpu" and bool(config.compute.trainer_gpus)
    return "bfloat16" if on_gpu or processor_has_bf16() else "float32"


def cpu_dtype(dtype: Literal["float32", "bfloat16"]) -> Literal["float32", "bfloat16"]:
    """The type in which a CPU holds and multiplies weights of this type.

    Without instructions for bfloat16 it is float32: emulated products take several times as long.
    """
    return dtype if processor_has_bf16() else "float32"


def processor_has_bf16() -> bool:
    """Whether this machine's processor multiplies in bfloat16; False where it does not say."""
    if not _CPUINFO.exists():
        return False
    lines = _CPUINFO.read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(_BF16_FLAGS & set(flags.split()))
