"""What only a GPU runs: recorded steps, and one step of every training. Skipped without CUDA."""

import json
from pathlib import Path

import pytest
import torch

from nla_ray.bench.card import SHAPES, Scene
from nla_ray.bench.gpu import GPUBenchmark, compact_engine, drawn_state, run_gpu_benchmark

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_section_runs_on_the_card(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    run_gpu_benchmark(GPUBenchmark(shape="small", output=str(output)))
    sections = json.loads(output.read_text())["sections"]
    assert not [name for name, figures in sections.items() if "error" in figures]


def test_a_recorded_step_gives_what_the_steps_give(tmp_path: Path) -> None:
    scene = Scene(SHAPES["small"], tmp_path, "cuda")
    recorded, eager = (
        compact_engine(scene, rows=6, recorded=recorded) for recorded in (True, False)
    )
    for version, size in enumerate((3e-4, 3e-2), 1):
        answers = []
        for engine in (recorded, eager):
            engine.load_weights(drawn_state(scene, size), version)
            answers.append(
                engine.generate(scene.activations(9), group_size=2, max_new_tokens=12, seed=3)
            )
        same = [a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)]
        assert sum(same) >= 0.9 * len(same)  # products of other shapes round otherwise
