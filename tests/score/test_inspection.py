"""The look at a base before training, where one layer's activations tell labels apart."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nla_ray.activation import vectors
from nla_ray.label.stage import label_texts, load_labels
from nla_ray.run.artifact import Run
from nla_ray.run.stages import INSPECTION_NAME
from nla_ray.score.ceiling import describe_inspection, inspect_layer, probe_words, round_up
from nla_ray.score.stage import inspect_base, next_command, write_preset
from nla_ray.settings.command_line import parse_arguments
from nla_ray.settings.config import CaptureConfig, CorpusConfig, RunConfig
from nla_ray.settings.presets import nano
from nla_ray.text.stage import build_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mean", "proposed"), [(472.0, 500.0), (43.2, 45.0), (50.0, 50.0), (1.01, 1.5), (154.0, 200.0)]
)
def test_the_proposed_norm_is_the_next_round_one(mean: float, proposed: float) -> None:
    assert round_up(mean) == pytest.approx(proposed)


def test_a_layer_that_labels_determine_has_a_ceiling_and_one_that_they_do_not_has_none() -> None:
    draw = torch.Generator().manual_seed(0)
    features, held_out, weight = (
        torch.randn(*shape, generator=draw) for shape in ((300, 8), (60, 8), (8, 8))
    )
    shift, documents = torch.full((8,), 5.0), [f"doc{row}" for row in range(60)]
    told = inspect_layer(
        features @ weight + shift, held_out @ weight + shift, features, held_out, documents
    )
    untold = inspect_layer(
        torch.randn(300, 8, generator=draw) + shift,
        torch.randn(60, 8, generator=draw) + shift,
        features,
        held_out,
        documents,
    )
    assert (
        told["ceiling"]["top1_2way"]["low"] > 0.95
        and told["ceiling"]["centred_cosine"]["value"] > 0.8
    )
    assert (
        untold["ceiling"]["top1_2way"]["value"] < 0.75
        and abs(untold["ceiling"]["centred_cosine"]["value"]) < 0.3
    )
    assert told["mean_norm"] == pytest.approx(vectors.norm(features @ weight + shift).mean().item())
    assert (
        told["norm_quantiles"]["0.01"] < told["mean_norm"] < told["norm_quantiles"]["0.99"]
        and told["injection_norm"] >= told["mean_norm"]
    )


def test_words_that_activations_hold_are_read_and_words_that_they_do_not_hold_are_not() -> None:
    draw = torch.Generator().manual_seed(0)
    words = [f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    present = torch.rand(460, len(words), generator=draw) < 0.15
    texts = [" ".join(words[place] for place in row.nonzero()) for row in present]
    directions = torch.randn(len(words), 32, generator=draw)
    families = [f"family{row}" for row in range(60)]

    def probed(vectors: torch.Tensor) -> dict[str, dict[str, float]]:
        return probe_words(vectors[:400], vectors[400:], texts[:400], texts[400:], families)

    held = probed(present.float() @ directions + 3.0)
    lost = probed(torch.randn(460, 32, generator=draw) + 3.0)
    assert set(held) == {"3", "5"}
    assert held["3"]["low"] > 0.8 > 0.3 > lost["3"]["high"]
    assert held["3"]["value"] > held["5"]["value"]
    assert probe_words(directions, directions, [""] * 26, [""] * 26, words) == {}


def test_a_base_is_inspected_from_texts_and_labels_alone(
    published_run: RunConfig, tmp_path, monkeypatch
) -> None:
    config = dataclasses.replace(
        published_run,
        run_dir=str(tmp_path / "run"),
        capture=CaptureConfig(layers=(0,)),
        corpus=CorpusConfig(max_chunks=400, test_share=0.1),
    )
    deeper = dataclasses.replace(
        config, base=dataclasses.replace(config.base, layer=99)
    )  # as of a preset for a base with more blocks
    build_corpus(Run(config))
    label_texts(Run(config))
    assert set(inspect_base(Run(deeper))["layers"]) == {"0"}
    with pytest.raises(ValueError, match="got 99, expected 0 to"):
        inspect_base(Run(dataclasses.replace(config, capture=CaptureConfig(layers=(0, 99)))))
    results = inspect_base(Run(config))
    assert set(results["layers"]) == {"0", str(config.base.layer)}
    assert (
        results["marker"]["configured"] == config.base.marker
        and results["texts"]["validation"] >= 10
    )
    assert json.loads((tmp_path / "run" / INSPECTION_NAME).read_text()) == results
    ceilings = {
        int(layer): one["ceiling"]["top1_10way"]["value"]
        for layer, one in results["layers"].items()
    }
    assert ceilings[results["proposed_layer"]] == max(ceilings.values())
    for layer in results["layers"].values():
        assert 0.0 < layer["probe"]["5"]["value"] <= layer["probe"]["3"]["value"] <= 1.0
    lines = describe_inspection(results)
    value = results["layers"]["0"]["probe"]["3"]["value"]
    assert f"{value:.3f} " in lines[3]
    assert (
        lines[-1].startswith(f"best ceiling (10-way): --base.layer {results['proposed_layer']} ")
        and len(lines) == 3 + 2 + 1
    )
    check_its_preset(Run(config), results, tmp_path, monkeypatch)
    inside = Run(dataclasses.replace(config, capture=CaptureConfig(positions="random:2")))
    with pytest.raises(ValueError, match=r"labels of capture.positions last, expected random:2"):
        inspect_base(inside)
    shutil.rmtree(tmp_path / "run" / "labels")
    label_texts(inside)
    labelled = {row["text_id"] for row in load_labels(inside, "validation")}
    assert inspect_base(inside)["texts"]["validation"] == len(labelled)


def check_its_preset(run: Run, results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset file that is written of it goes on with the run: corpus and labels are kept."""
    monkeypatch.chdir(tmp_path)
    file = write_preset(run, results, nano())
    command = shlex.split(next_command(run, file).partition("next: ")[2])
    assert command == ["python", "jobs/pipeline.py", "--preset", "run/preset.toml"]
    config = parse_arguments("test", command[2:])
    base = dataclasses.replace(
        run.given.base,
        layer=results["proposed_layer"],
        injection_norm=float(results["layers"][str(results["proposed_layer"])]["injection_norm"]),
        marker=results["marker"]["found"],
    )
    capture = dataclasses.replace(run.given.capture, layers=())
    assert config == dataclasses.replace(
        run.given, preset="run/preset.toml", run_dir="run", base=base, capture=capture
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / command[1]), *command[2:], "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for said in (
        "preset run/preset.toml",
        f"layer {base.layer} (",
        f"injection norm {base.injection_norm:g};",
        "corpus  (complete: skipped)",
        "labels  (complete: skipped)",
    ):
        assert said in done.stdout
