"""Environment variables of a process that computes on a CPU: its threads and its heap."""

from __future__ import annotations


def cpu_environment(threads: int) -> dict[str, str]:
    """The variables of a process that computes with `threads` threads; read when it starts."""
    return {
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
    }
