"""The environment variables of worker processes."""

from __future__ import annotations

from pathlib import Path

# Connecting ---------------------------------------------------------------------------------------


def worker_environment(threads: int, *, offline: bool = True) -> dict[str, str]:
    """Environment of every worker process: thread counts, no telemetry, quiet libraries, and no hub
    when `offline`."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Waiting threads sleep instead of spinning: where processes share cores, spinning for a
        # thread that lost its core took half of the CPU time (measured: 3,600 against 7,100 tokens
        # a CPU second). They spin for some microseconds before: two threads meet thousands of times
        # in a training step (3.8 s against 4.6 where they sleep at once).
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "20000",
        # A training step allocates and frees gigabytes. By default glibc gives them back each time
        # and the kernel zeroes new pages of 4 KB: up to a third of the time. Keep them, in large
        # pages (a step of SFT, SmolLM2-135M: 3.5 s against 4.7).
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_TOP_PAD_": str(2**26),
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
    return environment


def needs_hub(model: str) -> bool:
    """True when a base model is named by its hub id, and so may have to be downloaded."""
    return not (
        model.startswith(("embedded:", "package:"))
        or model.endswith(".gguf")
        or Path(model).exists()
    )
