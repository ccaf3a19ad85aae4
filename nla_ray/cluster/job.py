"""How a job starts and stops: `run_job(description, body)`.

    command line -> plan
    command line -> lock -> log -> Ray -> body -> shutdown

The body runs in a second thread, because Ray Train installs a SIGINT handler wherever `fit` runs in
the main thread. So the main thread alone decides what Ctrl-C does: stop within ten seconds, leave
no process behind, say how to resume. It knows nothing of any stage.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nla_ray.base.gpus import check_gpus
from nla_ray.cluster.connect import check_rollout_python, connect
from nla_ray.cluster.environment import job_environment, needs_hub
from nla_ray.cluster.errors import user_message
from nla_ray.cluster.processes import child_processes, kill_processes
from nla_ray.run.artifact import Run
from nla_ray.run.log import configure_logging, get_logger, release_terminal
from nla_ray.settings.config import RunConfig, require
from nla_ray.settings.views import check_views

if TYPE_CHECKING:
    import psutil

    from nla_ray.run.artifact import Run

logger = get_logger(__name__)

_STOP_SECONDS = 8.0
"""How long an interrupted job may take to unwind before its processes are killed."""
_INTERRUPTED = 130
"""Exit status of an interrupted job, as shells have it."""
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray, under this name, for the driver of a submitted job."""


# A job --------------------------------------------------------------------------------------------


def run_job(
    description: str,
    body: Callable[[Run], None],
    *,
    config_class: type[RunConfig] = RunConfig,
    ray: bool | Callable[[RunConfig], bool] = True,
    lock: bool = True,
    cleanup: Callable[[], None] | None = None,
) -> None:
    """Parse the command line and run `body` on the run it names; `--dry-run` prints a plan instead.

    `ray=False` is for a job that computes in this process, and a function of the configuration for
    one that does so under some; `lock=False` for one that only reads the run. `cleanup` is called
    in the end, interrupted or not, before Ray is left. Exit status: 0; 1 after one `error:` line
    for what a user can cause; 2 for a wrong command line; 130 when interrupted.
    """
    from nla_ray.settings.command_line import parse_arguments

    config = _with_lasting_run_dir(parse_arguments(description, config_class=config_class))
    try:
        check_gpus(config)
        _check_views(config)
        check_rollout_python(config.compute)
        if config.dry_run:
            from nla_ray.plan.text import describe_plan

            print(describe_plan(config, Path(sys.argv[0]).stem))
        else:
            with _interruptible():
                uses_ray = ray if isinstance(ray, bool) else ray(config)
                _run_connected(config, body, uses_ray, lock, cleanup or _nothing)
    except KeyboardInterrupt:
        _leave_interrupted()
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        logger.debug("stopped by an error", exc_info=error)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _check_views(config: RunConfig) -> None:
    """Raise ValueError for what is to be injected that a capture still to be made won't keep."""
    base, layers = config.base, {config.base.layer, *config.capture.layers}
    asks_more = bool(base.further_layers) or not all(view.is_of_activation for view in base.views)
    if asks_more and Run(config).find("activations") is None:
        check_views(base.views, layers, text_mean=config.capture.text_mean)
        require(
            layers >= {*base.further_layers},
            "base.further_layers",
            base.further_layers,
            f"layers that are captured: {sorted(layers)}",
            "Set --capture.layers to them as well.",
        )


def _with_lasting_run_dir(config: RunConfig) -> RunConfig:
    """The configuration with a run directory that every process finds: absolute, or a URI.

    In a submitted job a relative directory lies in the home folder: Ray deletes the folder that it
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
    from nla_ray.run.artifact import Run

    run, offline = Run(config), not needs_hub(config.base.model)
    # The driver computes too, and has imported nothing that reads these yet.
    for name, value in job_environment(config.compute, offline=offline).items():
        os.environ.setdefault(name, value)
    # As PYTHONWARNINGS does in the workers: this process has read it already.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    with run.locked() if lock else nullcontext():
        configure_logging(Path(run.root.path) / "run.log" if run.root.is_local else None)
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


# Stopping -----------------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt inside the with-block, once.

    The unwinding that follows has `_STOP_SECONDS`. After that, or at a second signal, every process
    that this one has started is killed, and this one leaves.
    """
    previous = {
        number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def _interrupt(signum: int, frame: object) -> None:
    """The first signal: begin to unwind, and see to it that the unwinding ends."""
    processes = child_processes()
    signal.signal(signal.SIGINT, lambda *_: _stop_at_once(processes))
    signal.signal(signal.SIGTERM, lambda *_: _stop_at_once(processes))
    watchdog = threading.Timer(_STOP_SECONDS, _stop_at_once, args=(processes,))
    watchdog.daemon = True
    watchdog.start()
    release_terminal()  # the thread that draws on it may never do so
    print("stopping ...", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _stop_at_once(processes: list[psutil.Process]) -> None:
    kill_processes(processes)
    _leave_interrupted()


def _leave_interrupted() -> None:
    """Say how to go on, then exit at once: the body's thread may still be computing."""
    command = shlex.join(["python", *sys.argv])
    print(
        f"stopped; what is complete is kept. To go on, run the same command again: {command}",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    logging.shutdown()
    os._exit(_INTERRUPTED)
