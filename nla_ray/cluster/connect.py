"""The only `ray.init`: the cluster that RAY_ADDRESS names, or an embedded one.

It protects the rule that no process of an embedded Ray outlives the job. It knows no stage.
"""

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
from nla_ray.cluster.processes import child_processes, kill_processes
from nla_ray.cluster.session_folder import session_folder
from nla_ray.run.log import get_logger
from nla_ray.settings.config import ComputeConfig

if TYPE_CHECKING:
    import psutil

logger = get_logger(__name__)

_OBJECT_STORE_BYTES = 400 * 2**20
_MIN_CPUS = 2
"""Logical CPUs of an embedded Ray, at least: every preset for one machine fits in two."""
_UNLIMITED = 1_000.0
"""Of every custom resource, on the one node of an embedded Ray."""
_SHUTDOWN_SECONDS = 3.0
"""How long the processes of an embedded Ray may take to leave by themselves."""
_CONNECT_SECONDS = 10.0
"""How long a cluster may take to answer at RAY_ADDRESS."""
_START_ATTEMPTS = 3
"""An embedded Ray that does not come up in Ray's own 30 s is started again."""


@contextmanager
def connect(compute: ComputeConfig, *, offline: bool = True) -> Iterator[None]:
    """Ray for the length of a with-block.

    It is the cluster that RAY_ADDRESS names (a submitted job's too), or an embedded one. The
    embedded cluster is a node of every kind: it holds any custom resource, and at least two logical
    CPUs. `offline`: workers see no hub. Raises ValueError when RAY_ADDRESS cannot be reached, and
    when an embedded cluster finds no folder for its session.
    """
    before = set(child_processes())
    environment = job_environment(compute, offline=offline)
    address = _cluster_address()
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
            "worker_process_setup_hook": "nla_ray.run.log.configure_worker_logging",
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


def check_rollout_python(compute: ComputeConfig) -> None:
    """Raise ValueError for a Python executable that is not there, where this machine is asked.

    Of a cluster that RAY_ADDRESS names its nodes have it, or Ray says that they do not.
    """
    path = compute.rollout_python
    if path is None or _cluster_address() is not None or os.access(path, os.X_OK):
        return
    raise ValueError(
        f"compute.rollout_python: got {path!r}, where no file is that can be run, expected the"
        " Python executable of an environment with nla_ray on this machine. Make it with: python -m"
        " venv FOLDER, install nla_ray and vLLM there, and set --compute.rollout-python"
        " FOLDER/bin/python."
    )


def _cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None: an embedded one.

    Raises ValueError for an address of Ray Client, through which Ray Train does not run, and for
    one of the dashboard.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address in (None, "", "local"):
        return None
    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS: got {address!r}, expected HOST:PORT of the cluster's head, or `auto` on"
            " one of its nodes. From outside the cluster, send the job to it: ray job submit"
            " --address http://HOST:8265 --working-dir . -- python jobs/..."
        )
    return address


def _start_ray(address: str | None, options: dict[str, Any], *, can_fail: bool) -> bool:
    """`ray.init`, with its errors in our words. Returns whether Ray has started.

    False, where the start `can_fail`: an embedded Ray did not come up in Ray's own fixed 30 s, as
    on a busy machine. The handler of SIGTERM is kept: Ray replaces it by its own.
    """
    import ray

    # It writes a paragraph about tokens at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **options)
    except ConnectionError as error:
        raise ValueError(_unreachable(address, error)) from None
    except PermissionError as error:
        if address is None:
            raise
        raise ValueError(
            f"Ray: got {str(error)!r}, expected a session that this user may read. The cluster at"
            f" {address} was started by another user: submit the job to it (ray job submit), or"
            " unset RAY_ADDRESS to use an embedded one."
        ) from None
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
    """Raise ValueError unless something listens at HOST:PORT.

    Ray's core ends the process where nothing does.
    """
    host, _, port = address.rpartition(":")
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
    """Leave Ray, wait for the processes that were started since `before`, and kill the rest."""
    import psutil
    import ray

    processes = [process for process in child_processes() if process not in before]
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_SHUTDOWN_SECONDS)
    kill_processes(alive)


def _embedded_options(compute: ComputeConfig) -> dict[str, Any]:
    custom = {
        compute.trainer_resource,
        compute.rollout_resource,
        compute.scorer_resource,
        compute.capture_resource,
    }
    return {
        "num_cpus": max(_MIN_CPUS, _cores()),
        "resources": dict.fromkeys(sorted(filter(None, custom)), _UNLIMITED),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": session_folder(),
    }


def _cores() -> int:
    """Cores that this process may run on; not every system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
