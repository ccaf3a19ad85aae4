"""The benchmark of a run: every comparison, written to one file, and its lines for a terminal.

Ours and the library's are timed by turns: `capture.py`, `generate.py` and `step.py`. Training and
the pipeline are not run again: their seconds are read from what the stages recorded. Nothing here
decides how a stage works.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from nla_ray.base.load import torch_device, weight_dtype
from nla_ray.bench.capture import benchmark_capture
from nla_ray.bench.generate import benchmark_generate
from nla_ray.bench.step import benchmark_step
from nla_ray.bench.texts import read_activations, test_texts
from nla_ray.bench.timing import REPETITIONS, STEP_REPETITIONS, describe_machine, distance_to_limits
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import MANIFEST_NAME
from nla_ray.run.metrics import METRICS_NAME
from nla_ray.run.stages import BENCHMARK_NAME, pipeline_timings

logger = get_logger(__name__)


_SECONDS = "seconds/"
"""What the names of a step's timings in a stage's metrics begin with."""
_TRIED_FIGURES = {
    "judge.centred_cosine": ("judge", "centred_cosine"),
    "linear.centred_cosine": ("linear", "centred_cosine"),
    "judge.top1_10way_hard": ("judge", "top1_10way_hard"),
    "claims.precision": ("claims", "precision"),
    "claims.distinct": ("claims", "distinct"),
}
"""Paired differences with SFT that are reported of a tried verbalizer."""


# what the stages have recorded --------------------------------------------------------------------


def train_breakdown(run: Run, stage: str) -> dict[str, Any] | None:
    """Where a training step's seconds go; None where the stage recorded none.

    Medians of every `seconds/...` figure in the stage's metrics.
    """
    file = run.root / stage / METRICS_NAME
    if not file.exists():
        return None
    records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    named = {name for record in records for name in record if name.startswith(_SECONDS)}
    if not named:
        return None
    medians = {}
    for name in sorted(named):
        seconds = [record[name] for record in records if name in record]
        medians[name.removeprefix(_SECONDS)] = statistics.median(seconds)
    step = medians.get("step")
    return {
        "steps": sum(_SECONDS + "step" in record for record in records),
        "median_seconds": medians,
        "share_of_step": (
            {name: seconds / step for name, seconds in medians.items()} if step else None
        ),
    }


def pipeline_seconds(run: Run) -> dict[str, Any] | None:
    """Seconds of every stage that a job completed in the run, and their sum; None without any."""
    stages = pipeline_timings(run)
    if not stages:
        return None
    return {"stages": stages, "seconds": sum(stages.values())}


def tried_verbalizers(run: Run) -> list[dict[str, Any]]:
    """What was tried on validation: settings of a verbalizer, and its differences with SFT.

    Every verbalizer of every report on validation, which is made by `jobs/evaluate.py
    --evaluation.split validation --compare NAME=PATH ...`. Differences are paired.
    """
    tried = []
    for path in run.root.list_files():
        artifact, _, file = path.partition("/")
        is_report = artifact.startswith("report_") and file == "report.json"
        if not (is_report and (run.root / artifact / MANIFEST_NAME).exists()):
            continue
        report = json.loads((run.root / path).read_text())
        if report["split"] == "validation":
            tried += _tried_in(report, artifact)
    return tried


def _tried_in(report: dict[str, Any], artifact: str) -> list[dict[str, Any]]:
    """The entries of one report. It has none of `grpo` when it is on another arm."""
    settings_of = {name: compared["settings"] for name, compared in report["compared"].items()}
    entries = []
    for name, settings in {"grpo": [], **settings_of}.items():
        paired = report["paired"].get(f"{name}-sft")
        if paired is None:
            continue
        entries.append(
            {
                "name": name,
                "settings": settings,
                "n": report["n"],
                "report": artifact,
                "minus_sft": {
                    figure: paired[scorer][metric]
                    for figure, (scorer, metric) in _TRIED_FIGURES.items()
                },
            }
        )
    return entries


# the job ------------------------------------------------------------------------------------------


def run_benchmarks(run: Run, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """All sections, written to `benchmark.json` of the run."""
    config, step_repetitions = run.config, min(repetitions, STEP_REPETITIONS)
    torch.set_num_threads(config.compute.threads)
    texts = test_texts(run)
    dtype = str(weight_dtype(config.base)).removeprefix("torch.")
    machine = describe_machine(dtype, torch_device(config.base).type)
    logger.info("benchmark: capture, %d repetitions of each side", repetitions)
    capture = distance_to_limits(benchmark_capture(config, texts, repetitions), machine)
    logger.info("benchmark: generate, %d repetitions of each side", repetitions)
    sft = run.find("sft")
    activations = read_activations(config, texts)
    with (
        tempfile.TemporaryDirectory(prefix="nla_ray_") as scratch,
        run.local_copy("sft", sft, "adapter/") if sft else nullcontext() as folder,
    ):
        adapter = str(folder) if folder else None
        generate = benchmark_generate(config, activations, adapter, repetitions)
        logger.info("benchmark: a step of GRPO, %d repetitions of each side", step_repetitions)
        step = benchmark_step(config, activations, adapter, Path(scratch), step_repetitions)
    results = {
        "preset": config.preset,
        "base": config.base.model,
        "machine": machine,
        "capture": capture,
        "generate": distance_to_limits(generate, machine),
        "step": distance_to_limits(step, machine),
        "train": {"grpo": train_breakdown(run, "grpo")},
        "pipeline": pipeline_seconds(run),
        "experiments": tried_verbalizers(run),
    }
    (run.root / BENCHMARK_NAME).write_text(json.dumps(results, indent=1) + "\n")
    return results


def describe_results(results: dict[str, Any]) -> list[str]:
    """The results as lines to print."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} threads, "
        f"{machine['dtype']}, {machine['matmul_flop_per_second'] / 1e9:.0f} GFLOP/s, "
        f"{machine['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    ]
    for name, unit in (("capture", "tokens"), ("generate", "tokens"), ("step", "rollouts")):
        part = results[name]
        lines.append(
            f"{name}: {part['ratio']:.2f}x ({part['ratio_low']:.2f} to {part['ratio_high']:.2f};"
            f" processor time {part['cpu_ratio']:.2f}x), {part['ours']['per_second']:.4g} against"
            f" {part['library']['per_second']:.4g} {unit}/s, {part['times_roofline']:.1f} times the"
            " roofline"
        )
    lines.append(
        f"generate: {100 * results['generate']['same_rows']:.0f} % of rows with the same tokens,"
        f" adapter {results['generate']['adapter']}"
    )
    for stage, breakdown in results["train"].items():
        if breakdown:
            parts = ", ".join(
                f"{name} {seconds:.2f}" for name, seconds in breakdown["median_seconds"].items()
            )
            lines.append(f"{stage}: median seconds of a step: {parts}")
    if results["pipeline"]:
        lines.append(f"pipeline: {results['pipeline']['seconds']:.0f} s in all stages together")
    for tried in results["experiments"]:
        figures = ", ".join(
            f"{name} {figure['value']:+.4f} [{figure['low']:+.4f}, {figure['high']:+.4f}]"
            for name, figure in tried["minus_sft"].items()
        )
        settings = "; ".join(tried["settings"]) or "the preset"
        lines.append(
            f"experiment {tried['name']} ({settings}), less SFT on {tried['n']} validation"
            f" activations: {figures}"
        )
    return lines
