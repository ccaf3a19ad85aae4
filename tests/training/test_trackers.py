"""The figures in TensorBoard and W&B: those of the records, no step twice, no harm by a failure."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import PartialState
from tiny import plain_nano

from nla_ray.run.location import Location
from nla_ray.settings.config import ComputeConfig, RunConfig
from nla_ray.training.checkpoints import TRAINED_NAME, Checkpoints
from nla_ray.training.trackers import Trackers, is_installed

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="needs tensorboard, which the test extra installs"
)

WANDB = """
from pathlib import Path
HERE = Path(__file__).parent
class Settings:
    def __init__(self, **settings): pass
class Run:
    def log(self, figures, step):
        with (HERE / "calls").open("a") as file: file.write(f"{step} {figures}\\n")
        if step == 3: raise ConnectionError("the server has gone\\nand more")
    def finish(self):
        with (HERE / "calls").open("a") as file: file.write("finished\\n")
def init(**arguments):
    begun = f"{arguments['name']} {arguments['id']} {arguments['resume']}\\n"
    with (HERE / "calls").open("a") as file: file.write(begun)
    return Run()
"""
"""A stand-in for the package: it writes down what it is told, and loses its server at step 3."""


def config_in(run_dir: Path | str) -> RunConfig:
    return dataclasses.replace(plain_nano(), run_dir=str(run_dir), compute=ComputeConfig(threads=1))


@pytest.fixture(autouse=True)
def process_state() -> None:
    """What a trainer has set up before: accelerate's trackers ask which process they are in."""
    PartialState(cpu=True)


@pytest.fixture(autouse=True)
def no_wandb_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in for W&B, installed; the file in which its calls appear."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path / "site" / "calls"
    sys.modules.pop("wandb", None)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def make_checkpoint(checkpoints: Checkpoints, step: int) -> None:
    (checkpoints.folder / f"checkpoint-{step}").mkdir()
    (checkpoints.folder / f"checkpoint-{step}" / TRAINED_NAME).touch()


@needs_tensorboard
def test_tensorboard_shows_every_figure_of_the_records_and_of_a_step_done_again_only_the_second(
    tmp_path: Path,
) -> None:
    first = Checkpoints(config_in(tmp_path), "grpo")
    trackers = first.trackers()
    for record in (
        {"step": 0, "monitor/judge": 0.5},
        {"step": 1, "loss": 3.0, "seconds/step": 2.5},
        {"step": 2, "loss": 2.0},
    ):
        trackers.write(record)
    make_checkpoint(first, 2)
    trackers.write({"step": 3, "loss": 9.0})  # and the worker is killed: nothing is closed

    again = Checkpoints(config_in(tmp_path), "grpo").trackers()
    again.write({"step": 3, "loss": 1.5})
    again.close()
    assert scalars(tmp_path / "tensorboard" / "grpo") == {
        "monitor/judge": [(0, 0.5)],
        "loss": [(1, 3.0), (2, 2.0), (3, 1.5)],
        "seconds/step": [(1, 2.5)],
    }


@needs_tensorboard
def test_a_stage_begun_anew_hides_all_that_was_there(tmp_path: Path) -> None:
    for loss in (3.0, 2.0):
        trackers = Checkpoints(config_in(tmp_path), "sft").trackers()
        trackers.write({"step": 0, "loss": loss})
        trackers.close()
    assert scalars(tmp_path / "tensorboard" / "sft") == {"loss": [(0, 2.0)]}


@needs_tensorboard
def test_a_remote_run_has_no_tensorboard_and_says_so(told: list[str]) -> None:
    trackers = Checkpoints(config_in("memory://bucket/runs/trackers-test"), "sft").trackers()
    trackers.write({"step": 1, "loss": 1.0})
    assert told == ["sft: no TensorBoard, which needs a local run directory"]
    Location.of("memory://bucket/runs/trackers-test").delete()


def test_a_process_that_does_not_write_metrics_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    Checkpoints(config_in(tmp_path), "sft").trackers().write({"step": 1, "loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_is_not_even_imported_unless_the_environment_asks_for_it(
    tmp_path: Path, wandb_calls: Path
) -> None:
    trackers = Trackers.of(config_in(tmp_path), "sft", scratch=tmp_path, first_step=0)
    trackers.write({"step": 1, "loss": 1.0})
    trackers.close()
    assert "wandb" not in sys.modules and not wandb_calls.exists()


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_API_KEY", "secret"), ("WANDB_MODE", "offline")]
)
def test_wandb_gets_every_figure_and_a_resumed_stage_goes_on_with_its_run(
    tmp_path: Path, wandb_calls: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for step in (1, 2):
        trackers = Trackers.of(
            config_in(tmp_path / "run"), "sft", scratch=tmp_path, first_step=step
        )
        trackers.write({"step": step, "loss": 1.0})
        trackers.close()
    begun, figures, finished, *second = wandb_calls.read_text().splitlines()
    assert begun.split() == ["run/sft", (tmp_path / "wandb_id").read_text(), "allow"]
    assert (figures, finished) == ("1 {'loss': 1.0}", "finished")
    assert second == [begun, "2 {'loss': 1.0}", "finished"]


def test_a_tracker_that_fails_is_told_once_and_left_out(
    tmp_path: Path, wandb_calls: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers.of(config_in(tmp_path / "run"), "sft", scratch=tmp_path, first_step=0)
    for step in (2, 3, 4):
        trackers.write({"step": step, "loss": 1.0})
    trackers.close()
    assert told == [
        "W&B is left out: ConnectionError: the server has gone. Every figure is in metrics.jsonl."
    ]
    assert [line.split()[0] for line in wandb_calls.read_text().splitlines()[1:]] == ["2", "3"]


def test_a_folder_that_is_called_wandb_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb_runs_of_before").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("wandb_runs_of_before") and is_installed("json")
