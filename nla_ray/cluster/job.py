"""The rim to Ray: the only `ray.init`, what each kind of process asks of the cluster, and how a job
starts and stops.

A job is `run_job(description, body)`: command line -> dry run, or lock -> log -> Ray -> body ->
shutdown. The body runs in a thread of its own, because Ray Train installs a SIGINT handler wherever
`fit` runs in the main thread; so the main thread alone decides what Ctrl-C does: stop within ten
seconds, leave no process behind, say how to resume. Knows nothing of any stage.
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

from nla_ray.cluster.connect import connect, descendants, kill
from nla_ray.cluster.environment import job_environment, needs_hub
from nla_ray.cluster.errors import user_message
from nla_ray.run.log import configure, get_logger, release_terminal
from nla_ray.settings.config import RunConfig

if TYPE_CHECKING:
    from nla_ray.run.artifact import Run

logger = get_logger(__name__)


_STOP_SECONDS = 8.0
_INTERRUPTED = 130
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray, under this name, for the driver of a submitted job."""


# A job --------------------------------------------------------------------------------------------


def run_job(
    description: str,
    body: Callable[[Run], None],
    *,
    config_class: type[RunConfig] = RunConfig,
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
    from nla_ray.settings.command_line import parse_arguments

    config = _with_lasting_run_dir(parse_arguments(description, config_class=config_class))
    try:
        if config.dry_run:
            from nla_ray.plan.text import describe_plan

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
    from nla_ray.run.artifact import Run

    run, offline = Run(config), not needs_hub(config.base.model)
    for name, value in job_environment(config.compute, offline=offline).items():
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


# Stopping -----------------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt here, once; the unwinding that follows has
    `_STOP_SECONDS`.

    After that, or at a second signal, every process this one started is killed and this one leaves.
    """

    def stop_hard(processes: list) -> None:
        kill(processes)
        _leave_interrupted()

    def interrupt(signum: int, frame: object) -> None:
        processes = descendants()
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
