"""What a run tells its user: log lines, and the progress of a stage.

It knows nothing of Ray or of any stage. It protects the rule that a terminal has one writer: lines
and what is drawn below them never go through each other.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress

_ROOT = "nla_ray"
"""The logger of the package, above those of its modules."""
_QUIET_LIBRARIES = (
    "ray",
    "ray.data",
    "ray.train",
    "ray.serve",
    "transformers",
    "datasets",
    "accelerate",
    "httpx",
    "httpx2",
    "openai",
    "anthropic",
    "urllib3",
    "botocore",
    "werkzeug",
)
_LINE_SECONDS = 10.0
"""Seconds between two progress lines where there is no terminal to draw a bar on."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`.

    It is silent below WARNING until `configure_logging` or `configure_worker_logging` ran.
    """
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging(log_path: Path | None = None) -> None:
    """Show nla_ray's lines from INFO on stderr, and those of libraries from WARNING.

    With `log_path` all lines go into that file too. A file that cannot be written is left out: the
    run itself will say why.
    """
    handlers: list[logging.Handler] = [_terminal_handler()]
    if log_path is not None:
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(log_path)
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            file.setLevel(logging.DEBUG)
            handlers.append(file)
        except OSError:
            pass
    _install(handlers)


def configure_worker_logging() -> None:
    """The same in a worker process: messages alone, and libraries from ERROR.

    Ray runs it in every worker process of a job, before any task (`worker_process_setup_hook`), and
    carries the lines to the driver.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _install([handler])
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _install(handlers: list[logging.Handler]) -> None:
    logger = logging.getLogger(_ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if len(handlers) > 1 else logging.INFO)
    logger.propagate = False
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed sets its own level when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _terminal_handler() -> logging.Handler:
    console = terminal()
    if console is not None:
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
        )
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO)
    return handler


# The terminal -------------------------------------------------------------------------------------

_displays: list[Live | Progress] = []
"""What is drawn on the terminal now."""


def terminal() -> Console | None:
    """The console on stderr, the same for all; None where stderr is no terminal.

    A line that a second console wrote would go through what is drawn.
    """
    return _stderr_console() if sys.stderr.isatty() else None


@cache
def _stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def drawn(display: Live | Progress) -> Iterator[None]:
    """Show a bar or a panel below all lines, for the length of a with-block."""
    _displays.append(display)
    try:
        with display:
            yield
    finally:
        _displays.remove(display)


def release_terminal() -> None:
    """End what is drawn now: for a process that leaves while another thread draws."""
    for display in list(_displays):
        display.stop()


# Progress -----------------------------------------------------------------------------------------


@contextmanager
def stage_progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Progress of a stage of `total` units: yields `advance(count=1, note="")`.

    On a terminal a bar; elsewhere a line every ten seconds and one at the end.
    """
    console = terminal()
    show = _lines(title, total) if console is None else _bar(title, total, console)
    with show as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int, console: Console) -> Iterator[Callable[..., None]]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    progress = bars.Progress(
        *columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()
    )
    with drawn(progress):
        task = progress.add_task(title, total=total, note="")
        yield lambda count=1, note="": progress.update(task, advance=count, note=note)
    get_logger("progress").info("%s: %d of %d", title, int(progress.tasks[0].completed), total)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[..., None]]:
    started = written = time.monotonic()
    done = 0
    logger = get_logger("progress")

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, written
        done += count
        if time.monotonic() - written >= _LINE_SECONDS:
            written = time.monotonic()
            logger.info("%s: %d of %d%s", title, done, total, f", {note}" if note else "")

    yield advance
    logger.info("%s: %d of %d in %.1f s", title, done, total, time.monotonic() - started)
