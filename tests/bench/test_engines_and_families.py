"""Engines by turns on the embedded base, and every stage on a base of another architecture."""

import json
from pathlib import Path

import pytest

from nla_ray.base.families import FAMILIES
from nla_ray.bench.engines import EngineBenchmark, benchmark_engines, compare_engines
from nla_ray.bench.families import benchmark_families, describe_conformance, run_family
from nla_ray.bench.timing import RESULTS
from nla_ray.run.stages import PIPELINE_JOB, stages_of_job


def test_every_side_writes_as_many_tokens_of_as_many_rows() -> None:
    settings = EngineBenchmark(
        preset="nano", dtype="float32", rows=(2, 3), tokens=4, repetitions=1, without=("vllm",)
    )
    runs = compare_engines(settings)["runs"]
    assert [(run["rows"], run["temperature"]) for run in runs] == [
        (rows, temperature) for rows in (2, 3) for temperature in (0.0, 1.0)
    ]
    for run in runs:
        assert run["sides"].keys() == {"generate", "plain", "compact"}
        for side in run["sides"].values():
            assert side["per_second"] == pytest.approx(run["rows"] * 4 / side["seconds"])


def test_an_unknown_preset_or_family_is_refused_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for benchmark, arguments in (
        (benchmark_engines, ["--preset", "nobody"]),
        (benchmark_families, ["--only", "gemma"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            benchmark(arguments)
        assert stopped.value.code == 2
        assert f"got {arguments[1]!r}".replace("'gemma'", "gemma") in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gemma3_text"])
def test_every_stage_runs_on_a_base_with_windows_scaled_embeddings_and_norms_of_heads(
    ray_cluster: None, tmp_path: Path, family: str
) -> None:
    results = run_family(family, tmp_path)
    assert not [result["error"] for result in results.values() if "error" in result]
    stages = {stage.name for stage in stages_of_job(PIPELINE_JOB)} - {"base", "answers"}
    assert results.keys() == {*stages, "served"}


def test_the_table_that_ships_has_a_row_for_every_family_and_no_failure() -> None:
    results = json.loads((RESULTS / "families.json").read_text())
    assert results["families"].keys() == FAMILIES.keys()
    lines = list(describe_conformance(results))
    assert len(lines) == 2 + len(FAMILIES)
    assert not [line for line in lines if "failed" in line or "–" in line]
