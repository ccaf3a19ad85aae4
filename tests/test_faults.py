"""GRPO while its processes are killed: actors and trainers come back by themselves, a driver by the
same command."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from grpo_run import grpo_config, prepare_run

from nla_ray.activation.stage import load_activations
from nla_ray.reinforce import grpo, stage
from nla_ray.run.artifact import Run
from nla_ray.run.metrics import MetricsLog
from nla_ray.settings.config import BaseConfig

pytestmark = pytest.mark.slow  # processes are killed and runs restarted: minutes on two cores

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
DRIVER = """
import pickle, sys
from nla_ray.cluster.connect import connect
from nla_ray.reinforce.stage import train_grpo
from nla_ray.run.artifact import Run

if __name__ == "__main__":
    run = Run(pickle.load(open(sys.argv[1], "rb")))
    with run.locked(), connect(run.config.compute):
        train_grpo(run)
"""


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, tiny_base: BaseConfig, tmp_path_factory: pytest.TempPathFactory
) -> list[dict]:
    """The metrics of a run that nobody disturbs, trained in this process."""
    run = prepared(tiny_base, tmp_path_factory.mktemp("undisturbed"))
    with stage.actor_pools(
        run, load_activations(run, "train"), load_activations(run, "validation")
    ) as (bank, rollouts, scorers):
        data = stage.training_data(
            run, load_activations(run, "train"), load_activations(run, "validation"), bank
        )
        grpo.grpo_worker(
            {
                "run": run.config,
                "name": "grpo",
                "data": data,
                "rollouts": rollouts,
                "scorers": scorers,
                "tells_steps": True,
            }
        )
    return MetricsLog(Path(run.config.run_dir) / "grpo" / "scratch" / "metrics.jsonl").read()


def prepared(base: BaseConfig, folder: Path, **workers: int) -> Run:
    return prepare_run(
        grpo_config(base, folder / "run", steps=STEPS, save_steps=2, monitor_steps=3, **workers)
    )


def assert_same_run(metrics: Path, expected: list[dict], *, kl_tolerance: float = 1e-4) -> None:
    """The same steps, batches, rewards and updates; clocks aside.

    TRL averages the KL it reports over each worker's tokens, then over workers: with two it differs
    in the third digit.
    """
    records = MetricsLog(metrics).read()
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, wanted in zip(records, expected, strict=True):
        apart = {
            key
            for key in record
            if key.startswith("seconds/") or key in ("step_time", "kl", "monitor/kl")
        }
        assert {key: record[key] for key in record.keys() - apart} == pytest.approx(
            {key: wanted[key] for key in wanted.keys() - apart}, abs=1e-4
        ), record["step"]
        assert record.get("kl") == pytest.approx(wanted.get("kl"), abs=kl_tolerance)


def last_step(scratch: Path) -> int:
    """The last step that a run has recorded; -1 before the first."""
    path = scratch / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=-1)


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
    return found


def find_actor(name: str, root: int) -> int | None:
    """The pid of an actor of this class below process `root`."""
    for process in psutil.Process(root).children(recursive=True):
        try:
            if f"ray::{name}" in " ".join(process.cmdline()):
                return process.pid
        except psutil.Error:
            continue
    return None


def test_killed_actors_and_a_killed_trainer_of_two_do_what_an_undisturbed_trainer_does(
    undisturbed: list[dict], tiny_base: BaseConfig, tmp_path: Path
) -> None:
    run = prepared(tiny_base, tmp_path, trainer_workers=2, num_rollout_actors=2, zero_stage=2)
    scratch, killed = Path(run.config.run_dir) / "grpo" / "scratch", []

    def kill_one_after_another() -> None:
        for step, name in ((1, "RolloutWorker"), (2, "ScorerWorker"), (4, "RayTrainWorker")):
            wait_until(lambda step=step: last_step(scratch) >= step)
            pid = wait_until(lambda name=name: find_actor(name, os.getpid()))
            os.kill(pid, signal.SIGKILL)
            killed.append(name)

    killer = threading.Thread(target=kill_one_after_another, daemon=True)
    killer.start()
    manifest = stage.train_grpo(run)
    killer.join(1)
    assert killed == ["RolloutWorker", "ScorerWorker", "RayTrainWorker"]
    assert_same_run(run.root.path / Path("grpo/metrics.jsonl"), undisturbed, kl_tolerance=5e-3)
    assert {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "metrics.jsonl",
    } <= manifest.files.keys()
    assert manifest.metrics["published_step"] in (3, 6)
    assert set(manifest.parents) == {"activations", "sft", "reward_scorer", "judge_scorer"}
    assert stage.train_grpo(run) == manifest, "a complete artifact is skipped"


def test_grpo_goes_on_with_two_then_one_then_three_workers_and_other_actors(
    tiny_base: BaseConfig, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off_at(step: int) -> Callable[[dict], dict]:
        """A worker that refuses to begin a step."""

        def work(arguments: dict) -> dict:
            from nla_ray.reinforce import grpo

            class CutOff(grpo.GRPOCallback):
                def on_step_begin(self, args, state, control, **kwargs) -> None:
                    super().on_step_begin(args, state, control, **kwargs)
                    if state.global_step == step:
                        raise ValueError(f"cut off at step {step}")

            grpo.GRPOCallback = CutOff
            return grpo.grpo_worker(arguments)

        return work

    six = {"prompts_per_step": 6, "micro_batch_size": 8}
    whole = prepared(tiny_base, tmp_path / "whole", **six)
    stage.train_grpo(whole)
    parts = [
        (3, {"trainer_workers": 2, "num_rollout_actors": 2, "micro_batch_size": 6}),
        (5, {"trainer_workers": 1, "num_scorer_actors": 2}),
        (None, {"trainer_workers": 3, "micro_batch_size": 4, "zero_stage": 2}),
    ]
    prepared(tiny_base, tmp_path / "parts", **six)
    for step, changes in parts:
        run = Run(
            grpo_config(
                tiny_base,
                tmp_path / "parts" / "run",
                steps=STEPS,
                save_steps=2,
                monitor_steps=3,
                **{"zero_stage": 2, **six, **changes},
            )
        )
        if step is None:
            stage.train_grpo(run)
            break
        with pytest.raises(ValueError, match=f"cut off at step {step}"), monkeypatch.context() as m:
            m.setattr(stage, "grpo_worker", cut_off_at(step))
            stage.train_grpo(run)
    expected = MetricsLog(Path(whole.config.run_dir) / "grpo" / "metrics.jsonl").read()
    metrics = Path(run.config.run_dir) / "grpo" / "metrics.jsonl"
    assert_same_run(metrics, expected, kl_tolerance=5e-3)


def test_a_killed_driver_leaves_no_process_and_the_same_command_continues(
    undisturbed: list[dict], tiny_base: BaseConfig, tmp_path: Path
) -> None:
    run = prepared(tiny_base, tmp_path)
    scratch = Path(run.config.run_dir) / "grpo" / "scratch"
    script, config = tmp_path / "driver.py", tmp_path / "config.pickle"
    script.write_text(DRIVER)
    config.write_bytes(pickle.dumps(dataclasses.replace(run.config)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen([sys.executable, str(script), str(config)], env=environment)
    wait_until(lambda: last_step(scratch) >= 4 or driver.poll() is not None)
    assert driver.poll() is None, "the driver ended before it could be killed"
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=90)
    assert not alive
    assert not (Path(run.config.run_dir) / "grpo" / "manifest.json").exists()
    subprocess.run(
        [sys.executable, str(script), str(config)], env=environment, check=True, timeout=400
    )
    assert_same_run(Path(run.config.run_dir) / "grpo" / "metrics.jsonl", undisturbed)
    assert run.find("grpo") is not None
