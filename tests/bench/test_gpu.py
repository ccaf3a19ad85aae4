"""The GPU benchmark's script on a CPU, at the small shape: every section runs and is written."""

import json
from pathlib import Path

import pytest
import torch

from nla_ray.bench.gpu import (
    SECTIONS,
    GPUBenchmark,
    beside_limits,
    describe_figures,
    main,
    run_gpu_benchmark,
)

_WITHOUT_RAY = tuple(name for name in SECTIONS if name != "publication")


def test_every_section_runs_and_is_written_beside_the_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "results.json"
    settings = GPUBenchmark(shape="small", device="cpu", output=str(output), sections=_WITHOUT_RAY)
    results = run_gpu_benchmark(settings)
    assert json.loads(output.read_text()) == json.loads(json.dumps(results))
    sections = results["sections"]
    assert list(sections) == list(_WITHOUT_RAY)
    assert not [figures for figures in sections.values() if "error" in figures]
    for name in ("train_scorer", "train_sft", "train_grpo"):
        assert sections[name]["steps"] == 1
    assert 0 < sections["train_grpo"]["k3"] < 1e-3
    assert sections["capture"]["tokens"] >= 4 * 512 and sections["capture"]["per_second"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in _WITHOUT_RAY)


def test_a_section_that_fails_costs_no_other(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ["--shape", "small", "--device", "cpu", "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--sections", "unknown", "capture"])
    assert ended.value.code == 1
    sections = json.loads(output.read_text())["sections"]
    assert sections["unknown"]["error"] == "KeyError: 'unknown'"
    assert sections["capture"]["per_second"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_how_to_try_the_script(
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--device cpu --shape small" in capsys.readouterr().err


def test_work_stands_beside_what_the_card_could_do_in_the_time() -> None:
    machine = {"matmul_flop_per_second": 100.0, "copy_bytes_per_second": 10.0}
    figures = {"case": {"tokens": 8, "seconds": 4.0, "flop": 100.0, "bytes": 20.0}, "note": 1}
    expected = {"per_second": 2.0, "roofline_seconds": 2.0, "share_of_roofline": 0.5}
    assert beside_limits(figures, machine) == {"case": {**figures["case"], **expected}, "note": 1}
    assert describe_figures({"case": {"peak_bytes": 2_500_000_000}}) == ["case: peak_bytes 2.5 GB"]
