"""The panel drawn while GRPO trains: what it says, what it follows, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from nla_ray.reinforce.live import Follower, live_view, render, seconds_left, sparkline
from nla_ray.reinforce.monitor import JUDGE_COSINE, JUDGE_GAIN, PREFIX, REWARDED, WARNED
from nla_ray.reinforce.records import monitor_share
from nla_ray.run.location import Location
from nla_ray.run.metrics import MetricsLog


def step(number: int, seconds: float = 2.0) -> dict[str, float]:
    return {
        "step": number,
        "reward": 0.1 * number,
        "rewards/score/mean": 0.2 + 0.1 * number,
        "kl": 0.001 * number,
        "completions/mean_length": 40.0 - number,
        "seconds/step": seconds,
        "seconds/rollout": 0.5,
        "seconds/log_prob": 0.25,
        "seconds/score": 0.125,
        "seconds/update": 1.0,
    }


def reading(
    number: int,
    judge: float,
    rewarded: float,
    *,
    gain: float = 0.0,
    warned: bool = False,
    seconds: float = 0.2,
) -> dict[str, float]:
    return {
        "step": number,
        JUDGE_COSINE: judge,
        JUDGE_COSINE + "_low": judge - 0.03,
        JUDGE_COSINE + "_high": judge + 0.03,
        JUDGE_GAIN: gain,
        JUDGE_GAIN + "_low": gain - 0.01,
        JUDGE_GAIN + "_high": gain + 0.01,
        REWARDED: rewarded,
        PREFIX + "distinct_share": 0.95,
        PREFIX + "claim_precision": 0.48,
        WARNED: float(warned),
        "seconds/monitor": seconds,
    }


RECORDS = [
    reading(0, 0.52, 0.30, seconds=9.0),
    step(1),
    step(2),
    reading(2, 0.47, 0.33, gain=-0.05, warned=True),
    step(3),
    step(4),
    reading(4, 0.53, 0.34),
]


def shown(records: list[dict[str, float]], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(render(records, 8))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
def test_the_panel_shows_the_last_values_and_the_time_left_within_the_terminals_width(
    width: int,
) -> None:
    text = shown(RECORDS, width)
    lines = {line[1:24].strip(): line for line in text.splitlines()}
    for title, value in {
        "reward": "0.400",
        "score": "0.600",
        "KL to SFT": "0.0040",
        "tokens written": "36.0",
        "distinct share": "0.95",
        "claim precision": "0.48",
        "judge centred cosine": "0.530 [0.500, 0.560]",
        "seconds a step": "2.00",
    }.items():
        assert lines[title][24:].startswith(value), title
    assert (
        "step 4 of 8" in text
        and "rollout 0.50  log-prob 0.25  score 0.12  update 1.00  monitor +5%" in text
    )
    assert "0:00:08 left" in text
    assert {len(line) for line in text.splitlines()} == {width}


def test_a_warning_stays_in_the_monitors_words_when_the_next_reading_is_good() -> None:
    words = " ".join(line.strip("│ ") for line in shown(RECORDS).splitlines())
    assert (
        "step 2: reward hacking is likely. Since step 0" in words
        and "from 0.520 to 0.470, by 0.050 [0.040, 0.060] on the same activations" in words
    )
    assert "(1 of 3 readings warn.)" in words
    assert "hacking" not in shown(RECORDS[:3])


def test_a_warning_is_red() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(render(RECORDS, 8))
    assert "\x1b[1;31mstep 2: reward hacking is likely" in console.file.getvalue()


def test_a_panel_without_records_waits() -> None:
    text = shown([])
    assert "step 0 of 8" in text and "waiting for the first step" in text


def test_a_curve_goes_from_least_to_greatest_and_repeats_what_it_has_no_point_for() -> None:
    assert sparkline([(0, 1.0), (2, 8.0)], 3, 80) == "▁▁██"
    assert sparkline([(1, 0.0), (2, 7.0), (3, 1.0)], 3, 80) == " ▁█▂"
    assert sparkline([(0, 0.0), (1, 2.0), (2, 7.0), (3, 9.0)], 3, 2) == "▁█"
    assert sparkline([(0, 0.3), (1, 0.3)], 1, 80) == "▄▄"
    assert sparkline([(0, float("nan")), (1, 1.0), (2, 2.0)], 2, 80) == " ▁█"
    assert sparkline([], 0, 80) == " "


def test_the_time_left_counts_readings_and_the_share_leaves_out_that_which_waits() -> None:
    steps, readings = (
        [step(1), step(2, 4.0)],
        [reading(0, 0.5, 0.3, seconds=9.0), reading(2, 0.5, 0.3, seconds=1.5)],
    )
    assert seconds_left(steps, readings, 12) == pytest.approx((2.0 + 4.0 + 1.5) / 2 * 10)
    assert monitor_share(steps, readings) == pytest.approx(1.5 / 6.0)
    assert monitor_share([], readings[:1]) == 0.0


def test_a_followed_file_may_be_missing_torn_or_rewound(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "scratch" / "metrics.jsonl")
    follower = Follower(log.path)
    assert follower.records() == []
    log.append({"step": 1})
    log.append({"step": 2})
    assert follower.records() == [{"step": 1}, {"step": 2}]
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert follower.records() == [{"step": 1}, {"step": 2}]
    log.rewind("step", 1)
    assert follower.records() == [{"step": 1}]
    MetricsLog(log.path).append({"step": 2, "loss": 0.5})
    assert follower.records() == [{"step": 1}, {"step": 2, "loss": 0.5}]


def test_without_a_terminal_nothing_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with live_view(Location.of(tmp_path / "metrics.jsonl"), "grpo", 8) as is_shown:
        assert not is_shown
    assert capsys.readouterr() == ("", "")


DRIVER = """
import sys
from nla_ray.reinforce.live import live_view
from nla_ray.run.location import Location
try:
    with live_view(Location.of(sys.argv[1]), "grpo", 8) as is_shown:
        print("a line of a worker", file=sys.stderr)
        raise RuntimeError("cut off")
except RuntimeError:
    print("shown", is_shown, type(sys.stderr).__name__)
"""


def test_on_a_terminal_lines_go_above_the_panel_and_an_error_leaves_it_clean(
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in RECORDS)
    )
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "metrics.jsonl")],
        stderr=end,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )
    os.close(end)
    drawn: list[bytes] = []
    reader = threading.Thread(target=lambda: drawn.extend(everything(terminal)))
    reader.start()
    output, _ = driver.communicate(timeout=120)
    reader.join(10)
    os.close(terminal)
    text = b"".join(drawn).decode()
    assert output.split() == ["shown", "True", "TextIOWrapper"]
    assert text.index("a line of a worker") < text.rindex("judge centred cosine")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is there again"


def everything(terminal: int) -> Iterator[bytes]:
    """What is written to a terminal until its writer has gone."""
    while True:
        try:
            yield os.read(terminal, 65_536)
        except OSError:  # Linux: the other end is closed
            return


def test_the_view_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = set(threading.enumerate())
    with live_view(Location.of(tmp_path / "metrics.jsonl"), "grpo", 8) as is_shown:
        assert is_shown and set(threading.enumerate()) != before
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(threading.enumerate()) == before
