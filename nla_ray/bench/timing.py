"""Commands timed side by side in one run, and what the machine could do at most.

Knows functions without arguments and seconds, not what they do. Protects two rules: the sides take
turns, so that whatever else the machine does falls on both; the limits of the machine are measured
in the same run.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""Where results that ship lie in a checkout: one file a GPU, and one of families."""
REPETITIONS = 7
STEP_REPETITIONS = 3
_LIBRARIES_SHOWN = ("torch", "transformers", "peft", "trl", "ray")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of several repetitions of one piece of work."""

    wall: list[float]
    cpu: list[float]
    """Processor seconds of all threads: comparable also where the machine does other things."""

    def to_dict(self, count: int) -> dict[str, Any]:
        wall = statistics.median(self.wall)
        return {
            "seconds": wall,
            "cpu_seconds": statistics.median(self.cpu),
            "per_second": count / wall,
            "all_seconds": self.wall,
            "all_cpu_seconds": self.cpu,
        }


def side_by_side(
    ours: Callable[[], object], library: Callable[[], object], repetitions: int
) -> tuple[Timing, Timing]:
    """Time both by turns, as `taking_turns` does."""
    timings = taking_turns({"ours": ours, "library": library}, repetitions)
    return timings["ours"], timings["library"]


def taking_turns(sides: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, Timing]:
    """Time all by turns, after one unmeasured run of each; the order is turned round each time."""
    for work in sides.values():
        work()
    timings = {name: Timing(wall=[], cpu=[]) for name in sides}
    for repetition in range(repetitions):
        order = list(sides.items())
        for name, work in order if repetition % 2 == 0 else reversed(order):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            timings[name].wall.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)
    return timings


def timed_ratio(ours: Timing, library: Timing, count: int) -> dict[str, Any]:
    """Both timings of `count` tokens or rollouts, and the ratio library / ours.

    The ratio is that of the medians; its range is over pairs of neighbouring repetitions.

    >>> timed_ratio(Timing(wall=[1, 2, 3], cpu=[1]), Timing(wall=[4, 6, 9], cpu=[1]), 60)["ratio"]
    3.0
    """
    pairs = zip(ours.wall, library.wall, strict=True)
    ratios = [library_seconds / our_seconds for our_seconds, library_seconds in pairs]
    return {
        "ratio": statistics.median(library.wall) / statistics.median(ours.wall),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_ratio": statistics.median(library.cpu) / statistics.median(ours.cpu),
        "ours": ours.to_dict(count),
        "library": library.to_dict(count),
    }


# the machine --------------------------------------------------------------------------------------


def describe_machine(dtype: str, device: str) -> dict[str, Any]:
    """Processor, threads, versions, and two measured limits.

    The limits are matrix products (FLOP/s) and copying (bytes/s).
    """
    import importlib.metadata

    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": dtype,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES_SHOWN},
        "matmul_flop_per_second": _matmul_rate(getattr(torch, dtype), device),
        "copy_bytes_per_second": _copy_rate(device),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best_seconds(work: Callable[[], object], device: str, repetitions: int = 10) -> float:
    import torch

    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _matmul_rate(dtype, device: str) -> float:
    import torch

    size = 8_192 if device == "cuda" else 1_024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device)


def _copy_rate(device: str) -> float:
    import torch

    source = torch.zeros(1 << (30 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def roofline_seconds(work: Mapping[str, Any], machine: Mapping[str, Any]) -> float:
    """Seconds that `flop`, or `bytes` where they are counted, take at the machine's limits.

    The longer of the arithmetic and of the way through memory.

    >>> machine = {"matmul_flop_per_second": 4.0, "copy_bytes_per_second": 2.0}
    >>> roofline_seconds({"flop": 8.0}, machine), roofline_seconds({"flop": 8, "bytes": 6}, machine)
    (2.0, 3.0)
    """
    return max(
        work["flop"] / machine["matmul_flop_per_second"],
        work.get("bytes", 0) / machine["copy_bytes_per_second"],
    )


def distance_to_limits(result: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """The result, and the seconds that it would take at the measured limits of the machine."""
    ideal = roofline_seconds(result, machine)
    return {
        **result,
        "roofline_seconds": ideal,
        "times_roofline": result["ours"]["seconds"] / ideal,
        "library_times_roofline": result["library"]["seconds"] / ideal,
    }
