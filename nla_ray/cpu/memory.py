"""The heap of a process that trains on a CPU."""

from __future__ import annotations

import ctypes


def give_back_free_memory() -> None:
    """Return the heap's free pages to the system, where the C library can."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
