"""The only `ray.init`: the cluster that RAY_ADDRESS names, or an embedded one, for the length of a
with-block."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_ray.cluster.environment import job_environment
from nla_ray.run.log import get_logger
from nla_ray.settings.config import ComputeConfig

if TYPE_CHECKING:
    import psutil

logger = get_logger(__name__)


_OBJECT_STORE_BYTES = 400 * 2**20
_MIN_CPUS = 2
"""Logical CPUs of an embedded Ray, at least: every preset for one machine fits in two, whatever the
machine has."""
_ANY_NUMBER = 1_000.0
_SHUTDOWN_SECONDS = 3.0
"""How long the processes of an embedded Ray may take to leave by themselves."""
_CONNECT_SECONDS = 10.0
_START_ATTEMPTS = 3


@contextmanager
def connect(compute: ComputeConfig, *, offline: bool = True) -> Iterator[None]:
    """Ray for the length of a with-block: the cluster that RAY_ADDRESS names (a submitted job's
    too), or an embedded one.

    The embedded cluster is a node of every kind: it holds any custom resource, and at least two
    logical CPUs.
    """
    before = set(descendants())
    environment = job_environment(compute, offline=offline)
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        sources = str(Path(__file__).resolve().parents[2])  # a checkout that is not installed
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (sources, os.environ.get("PYTHONPATH")))
        )
    else:
        _require_reachable(address)
    options: dict[str, Any] = {
        "configure_logging": False,
        "log_to_driver": True,
        "runtime_env": {
            "env_vars": environment,
            "worker_process_setup_hook": "nla_ray.run.log.configure_worker",
        },
        **(_embedded_options(compute) if address is None else {}),
    }
    logger.debug("connecting to Ray: %s", address or "embedded")
    try:
        for attempts_left in reversed(range(_START_ATTEMPTS)):
            if _start_ray(address, options, can_fail=attempts_left > 0):
                break
            _shutdown(before)
        yield
    finally:
        _shutdown(before)


def _start_ray(address: str | None, options: dict[str, Any], *, can_fail: bool) -> bool:
    """`ray.init`, with its errors in our words and the SIGTERM handler that was there before (Ray
    puts its own there).

    False, where that `can_fail`: an embedded Ray did not come up in Ray's own fixed 30 s, as on a
    busy machine.
    """
    import ray

    logging.getLogger("ray._private.authentication").setLevel(
        logging.ERROR
    )  # a paragraph about tokens at every start
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **options)
    except ConnectionError as error:
        raise ValueError(_unreachable(address, error)) from None
    except SystemExit:  # Ray's answer to a SIGTERM while it starts
        raise KeyboardInterrupt from None
    except Exception as error:
        if not can_fail or "timed out during startup" not in str(error):
            raise
        logger.warning("Ray did not start within 30 s: the machine is busy. Trying again ...")
        return False
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    return True


def _require_reachable(address: str) -> None:
    """Raise ValueError unless something listens at HOST:PORT: Ray's core ends the process where
    nothing does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`, or a name that Ray resolves
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(_unreachable(address, error)) from None


def _unreachable(address: str | None, error: Exception) -> str:
    return (
        f"RAY_ADDRESS: got {address!r}, which cannot be reached ({error}), expected a running Ray"
        " cluster. Start it, or unset RAY_ADDRESS to use an embedded one."
    )


def _shutdown(before: set[psutil.Process]) -> None:
    """Leave Ray, and wait for every process that was started since `before`; what is still there is
    killed."""
    import psutil
    import ray

    processes = [process for process in descendants() if process not in before]
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_SHUTDOWN_SECONDS)
    kill(alive)


def _embedded_options(compute: ComputeConfig) -> dict[str, Any]:
    custom = {
        compute.trainer_resource,
        compute.rollout_resource,
        compute.scorer_resource,
        compute.capture_resource,
    }
    return {
        "num_cpus": max(_MIN_CPUS, _cores()),
        "resources": {name: _ANY_NUMBER for name in sorted(filter(None, custom))},
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }


def _cores() -> int:
    """Cores that this process may run on; not every system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def descendants() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children(recursive=True)


def kill(processes: list[psutil.Process]) -> None:
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
