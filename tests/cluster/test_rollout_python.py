"""Rollout actors in a Python environment of their own: `--compute.rollout-python`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nla_ray.cluster.actors import ActorPool
from nla_ray.cluster.connect import check_rollout_python
from nla_ray.cluster.resources import worker_options
from nla_ray.run.recipe import recipe_of
from nla_ray.run.stages import STAGES
from nla_ray.settings.config import ComputeConfig
from nla_ray.settings.resources import Kind

MARK = "NLA_TEST_PYTHON"


@pytest.fixture
def another_python(tmp_path: Path) -> str:
    """This Python by another executable, as one of another environment would be."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexport {MARK}="$0"\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def teller() -> type:
    # A class of this module would be looked for by name in the actor, where no test is.
    class Teller:
        def tell(self) -> tuple[str | None, bool]:
            """The executable that the process was started by; whether nla_ray is there."""
            import importlib.util
            import os

            return os.environ.get("NLA_TEST_PYTHON"), bool(importlib.util.find_spec("nla_ray"))

    return Teller


def test_rollout_actors_alone_run_by_the_executable_that_is_named(
    ray_cluster: None, another_python: str
) -> None:
    compute = ComputeConfig(rollout_python=another_python, threads=1)
    told: dict[Kind, object] = {}
    kinds: tuple[Kind, ...] = ("rollout", "scorer")
    for kind in kinds:
        pool = ActorPool(kind, teller(), (), count=1, compute=compute)
        try:
            [told[kind]] = pool.collect(pool.submit("tell", [()]))
        finally:
            pool.close()
    assert told == {"rollout": (another_python, True), "scorer": (None, True)}


def test_it_stands_beside_the_environment_of_the_kind() -> None:
    compute = ComputeConfig(rollout_python="/opt/vllm/bin/python", trainer_gpus=1.0, threads=3)
    runtime = worker_options(compute, "rollout")["runtime_env"]
    assert runtime["py_executable"] == "/opt/vllm/bin/python"
    assert runtime["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert "py_executable" not in worker_options(compute, "scorer")["runtime_env"]
    assert "runtime_env" not in worker_options(ComputeConfig(), "rollout")


def test_an_executable_that_is_not_there_is_refused_where_this_machine_computes(
    another_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_rollout_python(ComputeConfig())
    check_rollout_python(ComputeConfig(rollout_python=another_python))
    absent = ComputeConfig(rollout_python=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"rollout_python: got '.*absent', .*Make it with"):
        check_rollout_python(absent)
    os.chmod(another_python, 0o644)
    if not os.access(another_python, os.X_OK):
        with pytest.raises(ValueError, match="no file is that can be run"):
            check_rollout_python(ComputeConfig(rollout_python=another_python))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_rollout_python(absent)  # its nodes may have it
    with pytest.raises(ValueError, match="expected an absolute path"):
        ComputeConfig(rollout_python="venv/bin/python")


def test_a_job_says_so_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nla_ray.cluster.job import run_job

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    absent = ["--compute.rollout-python", str(tmp_path / "absent")]
    for more in ([], ["--dry-run"]):
        monkeypatch.setattr("sys.argv", ["grpo.py", "--run", str(tmp_path / "r"), *absent, *more])
        with pytest.raises(SystemExit, match="1"):
            run_job("A job.", lambda run: pytest.fail("begun"))
        assert "error: compute.rollout_python: got" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_no_artifact_knows_of_it() -> None:
    """So another executable makes no other artifact."""
    assert all("compute" not in stage.sections for stage in STAGES)
    assert "compute" not in recipe_of("grpo", {"base": {}, "grpo": {}})
