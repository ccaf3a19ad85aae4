"""The processes below this one: found, and killed when they do not leave by themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def child_processes() -> list[psutil.Process]:
    """Every process that this one has started, and those that they have started."""
    import psutil

    return psutil.Process().children(recursive=True)


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill these processes; those that have ended already are passed over."""
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
