"""The benchmark's arithmetic by hand, and one whole run of it on the tiny base.

No test asserts a time.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_artifacts

from nla_ray.bench.stage import (
    describe_results,
    pipeline_seconds,
    run_benchmarks,
    train_breakdown,
    tried_verbalizers,
)
from nla_ray.bench.timing import Timing, distance_to_limits, side_by_side, timed_ratio
from nla_ray.report.stage import make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.run.stages import BENCHMARK_NAME
from nla_ray.settings.config import RunConfig

TEXTS = [
    f"def number_{number}():\n    return {number} * {number % 7}\n" + "x = 1\n" * (number % 5)
    for number in range(1_400)
]


def test_the_two_sides_take_turns_and_who_begins_changes() -> None:
    calls: list[str] = []
    ours, library = side_by_side(lambda: calls.append("ours"), lambda: calls.append("library"), 3)
    assert calls == ["ours", "library", "ours", "library", "library", "ours", "ours", "library"]
    assert len(ours.wall) == len(library.wall) == len(ours.cpu) == 3


def test_a_ratio_is_that_of_the_medians_and_its_range_that_of_neighbours() -> None:
    result = timed_ratio(
        Timing(wall=[1, 2, 3], cpu=[1, 1, 1]), Timing(wall=[4, 6, 20], cpu=[2, 2, 2]), count=60
    )
    assert result["ratio"] == 3
    assert (result["ratio_low"], result["ratio_high"]) == (3, pytest.approx(20 / 3))
    assert result["cpu_ratio"] == 2
    assert result["ours"]["per_second"] == 30
    assert result["library"]["per_second"] == 10


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    machine = {"matmul_flop_per_second": 100.0, "copy_bytes_per_second": 10.0}
    result = {"flop": 200.0, "ours": {"seconds": 6.0}, "library": {"seconds": 20.0}}
    assert distance_to_limits(result, machine)["times_roofline"] == 3
    with_bytes = distance_to_limits({**result, "bytes": 40.0}, machine)
    assert (
        with_bytes["roofline_seconds"],
        with_bytes["times_roofline"],
        with_bytes["library_times_roofline"],
    ) == (4, 1.5, 5)


def test_a_step_is_broken_down_by_the_medians_of_what_the_stage_recorded(
    tiny_run: Callable[..., Run],
) -> None:
    run = tiny_run()
    assert train_breakdown(run, "grpo") is None
    records = [
        {"step": 1, "seconds/step": 4.0, "seconds/rollout": 1.0},
        {"step": 1, "reward": 0.1},
        {"step": 2, "seconds/step": 2.0, "seconds/rollout": 2.0},
        {"step": 3, "seconds/step": 3.0, "seconds/rollout": 1.5},
    ]
    (run.root / "grpo" / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    breakdown = train_breakdown(run, "grpo")
    assert breakdown["steps"] == 3
    assert breakdown["median_seconds"] == {"rollout": 1.5, "step": 3.0}
    assert breakdown["share_of_step"]["rollout"] == 0.5


def test_stage_times_are_summed(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run()
    assert pipeline_seconds(run) is None
    (run.root / "timings.json").write_text(json.dumps({"corpus": 1.5, "sft": 3.0}))
    assert pipeline_seconds(run) == {"stages": {"corpus": 1.5, "sft": 3.0}, "seconds": 4.5}


def test_experiments_are_what_reports_on_validation_show_beside_the_runs_own(
    published_run: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(published_run.run_dir, tmp_path / "run")
    run = Run(dataclasses.replace(published_run, run_dir=str(tmp_path / "run")))
    assert tried_verbalizers(run) == []
    hotter = dataclasses.replace(published_run.grpo, temperature=1.5, name="hotter")
    tiny_artifacts.publish_verbalizer(
        Run(dataclasses.replace(run.config, grpo=hotter)), "grpo_hotter", seed=9
    )
    evaluation = dataclasses.replace(
        published_run.evaluation, split="validation", min_documents=5, samples=0
    )
    tried = Run(
        dataclasses.replace(
            run.config, evaluation=evaluation, compare=(f"hotter={tmp_path}/run/grpo_hotter",)
        )
    )
    make_report(tried.config)
    grpo, hotter_grpo = tried_verbalizers(run)
    assert grpo["name"] == "grpo" and grpo["settings"] == [] and hotter_grpo["name"] == "hotter"
    assert hotter_grpo["settings"] == [
        "grpo.name: there 'hotter', here None",
        "grpo.temperature: there 1.5, here 1.0",
    ]
    report = read_report(tried)
    assert (
        hotter_grpo["minus_sft"]["judge.centred_cosine"]
        == report["paired"]["hotter-sft"]["judge"]["centred_cosine"]
    )


def test_a_benchmark_of_the_tiny_base_finds_the_same_results_on_both_sides(
    tiny_run: Callable[..., Run], publish_corpus: Callable[..., object]
) -> None:
    run = tiny_run()
    publish_corpus(run, [TEXTS])
    results = run_benchmarks(run, repetitions=1)
    assert results["generate"]["same_rows"] == 1
    assert results["capture"]["largest_relative_difference"] < 1e-4
    assert results["generate"]["rows"] == 64
    step = results["step"]
    assert step["rollouts"] == run.config.grpo.prompts_per_step * run.config.grpo.group_size
    assert (
        step["tokens"] == step["rollouts"] * run.config.grpo.max_new_tokens
        and step["times_roofline"] > 1
    )
    assert json.loads((run.root / BENCHMARK_NAME).read_text()) == results
    text = "\n".join(describe_results(results))
    assert "capture: " in text and "100 % of rows with the same tokens" in text


def test_too_few_texts_are_refused(
    tiny_run: Callable[..., Run], publish_corpus: Callable[..., object]
) -> None:
    run = tiny_run()
    publish_corpus(run)
    with pytest.raises(ValueError, match="expected at least 64"):
        run_benchmarks(run, repetitions=1)
