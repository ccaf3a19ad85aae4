"""GRPO while it trains, drawn on the driver's terminal: curves, seconds, warnings that stay.

It follows the stage's metrics.jsonl, which a worker writes: what is drawn is what is recorded.
Knows no trainer and starts no thread but rich's. Protects the rule that nothing changes where there
is no terminal.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nla_ray.reinforce.monitor import JUDGE_COSINE, PREFIX, WARNED, best_reading, hacking_warning
from nla_ray.reinforce.records import SECONDS, monitor_share
from nla_ray.run.location import Location
from nla_ray.run.log import drawn, terminal
from nla_ray.run.metrics import MetricsLog

CURVES = {
    "reward": ("reward", ".3f"),
    "score": ("rewards/score/mean", ".3f"),
    "KL to SFT": ("kl", ".4f"),
    "tokens written": ("completions/mean_length", ".1f"),
    "judge centred cosine": (JUDGE_COSINE, ".3f"),
    "distinct share": (PREFIX + "distinct_share", ".2f"),
    "claim precision": (PREFIX + "claim_precision", ".2f"),
    "seconds a step": (SECONDS + "step", ".2f"),
}
"""Title of a curve -> name of its figure in the records of steps or readings, and its format."""
_PARTS = {"rollout": "cyan", "log_prob": "blue", "score": "magenta", "update": "green"}
_RECENT = 20
"""Steps over which seconds are averaged."""
_REFRESHES_PER_SECOND = 2
_BLOCKS = "▁▂▃▄▅▆▇█"

Record = Mapping[str, float]


@contextmanager
def live_view(metrics: Location, title: str, total_steps: int) -> Iterator[bool]:
    """Draw the stage whose records appear in `metrics`, for the length of a with-block.

    Yields whether it is drawn: stderr must be a terminal, and the run directory a local folder (the
    records of a remote run come only with a checkpoint).
    """
    console = terminal()
    if console is None or console.is_dumb_terminal or not metrics.is_local:
        yield False
        return
    follower = Follower(Path(metrics.path))
    panel = Live(
        get_renderable=lambda: render(follower.records(), total_steps, title),
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        redirect_stdout=sys.stdout.isatty(),
    )
    with drawn(panel):
        yield True


class Follower:
    """The records of a metrics file that another process writes.

    That process may rewind the file, or be killed on it. It is read anew when it has changed.
    """

    def __init__(self, path: Path) -> None:
        self._log = MetricsLog(path)
        self._seen: tuple[int, int] | None = None
        self._records: list[dict[str, Any]] = []

    def records(self) -> list[dict[str, Any]]:
        """Every whole line, oldest first; nothing while there is no file."""
        if self._log.path.exists():
            status = self._log.path.stat()
            state = (status.st_mtime_ns, status.st_size)
            if state != self._seen:
                self._seen, self._records = state, self._log.read()
        return self._records


def render(records: Sequence[Record], total_steps: int, title: str = "grpo") -> RenderableType:
    """The panel for the records of steps and readings of a stage of `total_steps`."""
    steps = [record for record in records if SECONDS + "step" in record]
    readings = [record for record in records if JUDGE_COSINE in record]
    warning = _warning(readings)
    parts = [
        _progress(steps, readings, total_steps),
        _curves(records),
        *_seconds(steps, readings),
        *warning,
    ]
    return Panel(
        Group(*parts),
        title=f"[bold]{title}",
        title_align="left",
        border_style="red" if warning else "dim",
    )


def seconds_left(steps: Sequence[Record], readings: Sequence[Record], total_steps: int) -> float:
    """Seconds to the last step, at the pace of the last twenty steps and of their readings."""
    recent = steps[-_RECENT:]
    first_step = recent[0]["step"]
    stepped = sum(record[SECONDS + "step"] for record in recent)
    read = sum(
        reading[SECONDS + "monitor"] for reading in readings if reading["step"] >= first_step
    )
    return (stepped + read) / len(recent) * (total_steps - recent[-1]["step"])


def sparkline(points: Sequence[tuple[float, float]], last_step: int, width: int) -> str:
    """(step, value) pairs as a curve over steps 0 to `last_step`, from least value to greatest.

    A column without a point repeats the column before it. So a curve of every step and a curve of
    few steps have the same time axis.

    >>> sparkline([(0, 1.0), (2, 8.0)], last_step=3, width=4)
    '▁▁██'
    """
    columns = min(width, last_step + 1)
    binned: list[list[float]] = [[] for _ in range(columns)]
    for step, value in points:
        if math.isfinite(value):
            binned[int(step) * columns // (last_step + 1)].append(value)
    means = [sum(values) / len(values) if values else None for values in binned]
    drawn_means = [mean for mean in means if mean is not None]
    low, high = min(drawn_means, default=0.0), max(drawn_means, default=0.0)
    block, curve = " ", ""
    for mean in means:
        if mean is not None and math.isclose(low, high):
            block = _BLOCKS[3]
        elif mean is not None:
            block = _BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))]
        curve += block
    return curve


class _Curve:
    """A sparkline that fills the width of its column."""

    def __init__(self, points: Sequence[tuple[float, float]], last_step: int) -> None:
        self._points, self._last_step = points, last_step

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(sparkline(self._points, self._last_step, options.max_width), style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def _progress(steps: Sequence[Record], readings: Sequence[Record], total_steps: int) -> Table:
    done, left = 0, "waiting for the first step"
    if steps:
        done = int(steps[-1]["step"])
        left = f"{timedelta(seconds=round(seconds_left(steps, readings, total_steps)))} left"
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(
        f"step {done} of {total_steps}",
        ProgressBar(
            total=total_steps, completed=done, complete_style="cyan", finished_style="green"
        ),
        left,
    )
    return line


def _curves(records: Sequence[Record]) -> Table:
    last_step = int(max((record["step"] for record in records), default=0))
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, style="dim", justify="right")
    for title, (key, form) in CURVES.items():
        with_figure = [record for record in records if key in record]
        if not with_figure:
            table.add_row(title, "-", "", "")
            continue
        values = [record[key] for record in with_figure]
        points = [(record["step"], record[key]) for record in with_figure]
        span = f"{min(values):{form}} to {max(values):{form}}"
        newest = _value(with_figure[-1], key, form)
        table.add_row(title, newest, _Curve(points, last_step), span)
    return table


def _value(record: Record, key: str, form: str) -> Text:
    """The figure in bold, with its interval where it has one."""
    value = Text(f"{record[key]:{form}}", style="bold")
    if f"{key}_low" in record:
        value.append(
            f" [{record[f'{key}_low']:{form}}, {record[f'{key}_high']:{form}}]", style="not bold"
        )
    return value


def _seconds(steps: Sequence[Record], readings: Sequence[Record]) -> list[Text]:
    """Mean seconds of a step's parts, and the monitor's share; nothing before the first step."""
    if not steps:
        return []
    recent, line = steps[-_RECENT:], Text()
    for name, style in _PARTS.items():
        mean = sum(record.get(SECONDS + name, 0.0) for record in recent) / len(recent)
        line.append(f"{name.replace('_', '-')} {mean:.2f}  ", style=style)
    return [line.append(f"monitor +{monitor_share(steps, readings):.0%}", style="yellow")]


def _warning(readings: Sequence[Record]) -> list[Text]:
    """The newest warning in the monitor's words, and how many readings were warned of.

    It stays when later readings are good.
    """
    warned = [index for index, reading in enumerate(readings) if reading[WARNED]]
    if not warned:
        return []
    words = hacking_warning(readings[warned[-1]], best_reading(readings[: warned[-1]]))
    return [Text(f"{words} ({len(warned)} of {len(readings)} readings warn.)", style="bold red")]
