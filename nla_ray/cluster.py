"""The rim to Ray: the only `ray.init`, what each kind of process asks of the cluster, and how a job
starts and stops.

A job is `run_job(description, body)`: command line -> dry run, or lock -> log -> Ray -> body ->
shutdown. The body runs in a thread of its own, because Ray Train installs a SIGINT handler wherever
`fit` runs in the main thread; so the main thread alone decides what Ctrl-C does: stop within ten
seconds, leave no process behind, say how to resume. Knows nothing of any stage.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import shlex
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nla_ray.config import ComputeConfig, RunConfig
from nla_ray.runlog import configure, get_logger, release_terminal

if TYPE_CHECKING:
    import psutil

    from nla_ray.artifacts import Run

Kind = Literal["trainer", "rollout", "scorer", "capture", "serve"]

_OBJECT_STORE_BYTES = 400 * 2**20
_MIN_CPUS = 2
"""Logical CPUs of an embedded Ray, at least: every preset for one machine fits in two, whatever the
machine has."""
_ANY_NUMBER = 1_000.0
_SHUTDOWN_SECONDS = 3.0
"""How long the processes of an embedded Ray may take to leave by themselves."""
_STOP_SECONDS = 8.0
_CONNECT_SECONDS = 10.0
_START_ATTEMPTS = 3
_INTERRUPTED = 130
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray, under this name, for the driver of a submitted job."""
_USER_ERRNOS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "choose another --run-dir",
    errno.EACCES: "choose another --run-dir",
    errno.EADDRINUSE: "choose another --serve.port",
}
"""Operating-system errors that a user can cause, and the remedy."""

_DISK_FULL = re.compile(
    r"No space left on device|PytorchStreamWriter failed|inline_container.*unexpected pos"
)
"""What libraries that write files below Python say instead of raising an OSError."""

logger = get_logger(__name__)


# What a process asks for --------------------------------------------------------------------------


def resources_of(compute: ComputeConfig, kind: Kind) -> dict[str, float]:
    """Resources of one process, as Ray Train's `resources_per_worker` takes them.

    Example: `{"CPU": 8.0, "GPU": 1.0, "trainer_node": 1.0}`; a resource that is not asked for is
    left out.
    """
    cpus, gpus, custom = {
        "trainer": (compute.trainer_cpus, compute.trainer_gpus, compute.trainer_resource),
        "rollout": (compute.rollout_cpus, compute.rollout_gpus, compute.rollout_resource),
        "scorer": (compute.scorer_cpus, compute.scorer_gpus, compute.scorer_resource),
        "capture": (compute.capture_cpus, compute.capture_gpus, compute.capture_resource),
        "serve": (compute.serve_cpus, compute.serve_gpus, None),
    }[kind]
    resources = {"CPU": float(cpus)}
    if gpus:
        resources["GPU"] = float(gpus)
    if custom:
        resources[custom] = 1.0
    return resources


def worker_options(compute: ComputeConfig, kind: Kind) -> dict[str, Any]:
    """The same as arguments of `.options(...)`, `map_batches(...)` or `ray_actor_options`."""
    resources = resources_of(compute, kind)
    return {
        "num_cpus": resources.pop("CPU"),
        "num_gpus": resources.pop("GPU", 0.0),
        "resources": resources,
    }


@dataclass(frozen=True, kw_only=True)
class Demand:
    """`count` processes that must run at the same time, and what one of them asks for.

    Example: Demand(name="trainer", count=4, resources={"CPU": 8.0, "GPU": 1.0, "trainer_node":
    1.0})
    """

    name: str
    count: int
    resources: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.count} x {self.name} ({_amounts(self.resources)} each)"


def demand(compute: ComputeConfig, kind: Kind, count: int = 1) -> Demand:
    """The demand of `count` processes of one kind."""
    return Demand(name=kind, count=count, resources=resources_of(compute, kind))


def require_resources(demands: Iterable[Demand]) -> None:
    """Check, before anything starts, that all demands fit into the cluster at once, nodes it may
    still add included.

    Raises ValueError that says what is missing: a request that can never be met would wait for
    ever.
    """
    wanted = list(demands)
    nodes = _node_capacities()
    unmet = unmet_demands(wanted, nodes)
    if unmet:
        total: dict[str, float] = {}
        for node in nodes:
            for name, amount in node.items():
                total[name] = total.get(name, 0.0) + amount
        raise ValueError(
            f"cluster resources: got {len(nodes)} nodes with {_amounts(total)} in all, expected"
            f" room for {'; '.join(map(str, wanted))} at once; no room is left for"
            f" {'; '.join(map(str, unmet))}. Add nodes, or ask for less with --compute.* or a"
            " smaller number of actors."
        )


def unmet_demands(demands: Iterable[Demand], nodes: Iterable[dict[str, float]]) -> list[Demand]:
    """The part of the demands that finds no place when they are laid into the nodes, the largest
    first."""
    free = [dict(node) for node in nodes]
    unmet = []
    for wanted in sorted(
        demands, key=lambda one: (-one.resources.get("GPU", 0.0), -one.resources.get("CPU", 0.0))
    ):
        missing = 0
        for _ in range(wanted.count):
            node = next(
                (
                    node
                    for node in free
                    if all(
                        node.get(name, 0.0) >= amount - 1e-9
                        for name, amount in wanted.resources.items()
                    )
                ),
                None,
            )
            if node is None:
                missing += 1
                continue
            for name, amount in wanted.resources.items():
                node[name] -= amount
        if missing:
            unmet.append(Demand(name=wanted.name, count=missing, resources=wanted.resources))
    return unmet


def _node_capacities() -> list[dict[str, float]]:
    """Resources of every node that is alive or that the autoscaler may start.

    Source: `get_cluster_config` is what Ray Train itself asks before it waits for a placement
    group.
    """
    import ray
    from ray._private.state import state

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()
    if config is not None:
        for group in config.node_group_configs:
            present = sum(
                all(node.get(name, 0) >= amount for name, amount in group.resources.items())
                for node in nodes
            )
            more = (100 if group.max_count < 0 else group.max_count) - present
            nodes += [
                {name: float(amount) for name, amount in group.resources.items()}
                for _ in range(max(0, more))
            ]
    return nodes


def _amounts(resources: dict[str, float]) -> str:
    shown = {
        name: amount
        for name, amount in resources.items()
        if not name.startswith(("node:", "accelerator_type:"))
        and name not in ("memory", "object_store_memory")
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"


def run_placed(config: RunConfig, kind: Kind, work: Callable[[RunConfig], None]) -> None:
    """`work(config)` in one Ray process that is placed like one of `kind`, or in this process when
    Ray is not there.

    Raises ValueError when the cluster has no room for it. A process that dies is started again,
    three times at most.
    """
    import ray

    if not ray.is_initialized():
        work(config)
        return
    require_resources([demand(config.compute, kind)])
    ray.get(
        ray.remote(work)
        .options(max_retries=3, **worker_options(config.compute, kind))
        .remote(config)
    )


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


@contextmanager
def connect(compute: ComputeConfig, *, offline: bool = True) -> Iterator[None]:
    """Ray for the length of a with-block: the cluster that RAY_ADDRESS names (a submitted job's
    too), or an embedded one.

    The embedded cluster is a node of every kind: it holds any custom resource, and at least two
    logical CPUs.
    """
    before = set(_descendants())
    environment = worker_environment(compute.threads, offline=offline)
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        sources = str(Path(__file__).resolve().parent.parent)  # a checkout that is not installed
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
            "worker_process_setup_hook": "nla_ray.runlog.configure_worker",
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

    processes = [process for process in _descendants() if process not in before]
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_SHUTDOWN_SECONDS)
    _kill(alive)


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


# A job --------------------------------------------------------------------------------------------


def run_job(
    description: str,
    body: Callable[[Run], None],
    *,
    ray: bool = True,
    lock: bool = True,
    cleanup: Callable[[], None] | None = None,
) -> None:
    """Parse the command line and run `body` on the run it names; `--dry-run` prints the plan of
    this job instead.

    `lock=False` is for a job that only reads the run. `cleanup` is called in the end, interrupted
    or not, while Ray is there. Exit status: 0; 1 after one `error:` line for what a user can cause;
    2 for a wrong command line; 130 when interrupted.
    """
    from nla_ray.presets import parse_arguments

    config = _with_lasting_run_dir(parse_arguments(description))
    try:
        if config.dry_run:
            from nla_ray.plan import describe_plan

            print(describe_plan(config, Path(sys.argv[0]).stem))
        else:
            with _interruptible():
                _run_connected(config, body, ray, lock, cleanup or _nothing)
    except KeyboardInterrupt:
        _leave_interrupted()
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        logger.debug("stopped by an error", exc_info=error)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _with_lasting_run_dir(config: RunConfig) -> RunConfig:
    """The run directory as every process of the run finds it: absolute, or a URI.

    In a submitted job a relative one lies in the home folder: Ray deletes the folder that it
    unpacks the job into.
    """
    if "://" in config.run_dir:
        return config
    start = Path.home() / "nla_ray" if _SUBMITTED in os.environ else Path.cwd()
    return dataclasses.replace(config, run_dir=str(start / config.run_dir))


def _run_connected(
    config: RunConfig,
    body: Callable[[Run], None],
    ray: bool,
    lock: bool,
    cleanup: Callable[[], None],
) -> None:
    from nla_ray.artifacts import Run

    run, offline = Run(config), not needs_hub(config.base.model)
    for name, value in worker_environment(config.compute.threads, offline=offline).items():
        os.environ.setdefault(
            name, value
        )  # the driver computes too, and has imported nothing that reads these yet
    if not sys.warnoptions:
        warnings.simplefilter(
            "ignore"
        )  # as PYTHONWARNINGS does in the workers; this process has read it already
    with run.locked() if lock else nullcontext():
        configure(Path(run.root.path) / "run.log" if run.root.is_local else None)
        with connect(config.compute, offline=offline) if ray else nullcontext():
            try:
                _run_in_thread(body, run)
            finally:
                cleanup()


def _nothing() -> None:
    """What a job without `cleanup` does in the end."""


def _run_in_thread(body: Callable[[Run], None], run: Run) -> None:
    """Run the body outside the main thread and raise here what it raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            body(run)
        except BaseException as error:  # not handled: the main thread raises it again
            raised.append(error)

    thread = threading.Thread(target=guarded, name="job", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if raised:
        raise raised[0]


def user_message(error: BaseException) -> str | None:
    """The one message of an error that a user can cause, wherever in Ray it was raised; None for
    any other error."""
    for cause in _causes(error):
        if type(cause) is ValueError:
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in _USER_ERRNOS:
            return _refused(cause.errno, cause.filename)
        if _DISK_FULL.search(str(cause)):
            return _refused(errno.ENOSPC, None)
        if type(cause).__module__.startswith(
            "ray."
        ):  # Ray Data and an actor that died in __init__ keep only the text
            if told := re.search(r"^ValueError: (.+)$", str(cause), re.MULTILINE):
                return told[1].strip()
            told = re.search(
                r"^(?:OSError|PermissionError): \[Errno (\d+)\]", str(cause), re.MULTILINE
            )
            if told and int(told[1]) in _USER_ERRNOS:
                return _refused(int(told[1]), None)
    return None


def _refused(number: int, path: str | None) -> str:
    where = f" at {path}" if path else ""
    return (
        f"operating system: got {os.strerror(number).lower()!r}{where}, expected to be allowed and"
        f" able to use it. Nothing complete was damaged: {_USER_ERRNOS[number]} and run the same"
        " command again."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it: inside Ray's task, actor and training errors, and along
    `raise ... from`."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = vars(current)
        nested = [
            inner.get("cause"),
            inner.get("controller_failure"),
            current.__cause__,
            *(inner.get("worker_failures") or {}).values(),
        ]
        waiting += [one for one in nested if isinstance(one, BaseException)]


# Stopping -----------------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt here, once; the unwinding that follows has
    `_STOP_SECONDS`.

    After that, or at a second signal, every process this one started is killed and this one leaves.
    """

    def stop_hard(processes: list) -> None:
        _kill(processes)
        _leave_interrupted()

    def interrupt(signum: int, frame: object) -> None:
        processes = _descendants()
        signal.signal(signal.SIGINT, lambda *_: stop_hard(processes))
        signal.signal(signal.SIGTERM, lambda *_: stop_hard(processes))
        watchdog = threading.Timer(_STOP_SECONDS, stop_hard, args=(processes,))
        watchdog.daemon = True
        watchdog.start()
        release_terminal()  # the thread that draws there may never get to it
        print("stopping ...", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def _leave_interrupted() -> None:
    """One line how to go on, then exit at once: the body's thread may still be computing."""
    command = shlex.join(["python", *sys.argv])
    print(
        f"stopped; what is complete is kept. To go on, run the same command again: {command}",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    logging.shutdown()
    os._exit(_INTERRUPTED)


def _descendants() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children(recursive=True)


def _kill(processes: list[psutil.Process]) -> None:
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
