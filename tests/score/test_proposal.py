"""The preset that an inspection proposes: its values, their sources, and what is never lost."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nla_ray.run.artifact import Run
from nla_ray.score.proposal import proposal_text, proposed_config
from nla_ray.score.stage import next_command, write_preset
from nla_ray.settings.command_line import parse_arguments
from nla_ray.settings.config import RunConfig
from nla_ray.settings.preset_file import load_preset
from nla_ray.settings.presets import override, preset

START = preset("smollm2-135m")
MODEL = 'bases\\"mine" \u00e9\nof two lines'


def inspected_layer(choice: float, norm: float, probe: dict[str, Any]) -> dict[str, Any]:
    return {
        "mean_norm": norm,
        "norm_quantiles": {"0.01": norm - 10, "0.5": norm, "0.99": norm + 10},
        "injection_norm": 250,
        "ceiling": {"top1_10way": {"value": choice, "low": choice - 0.1, "high": choice + 0.1}},
        "probe": probe,
    }


def results_of(**changed: Any) -> dict[str, Any]:
    probe = {str(count): {"value": 0.5, "low": 0.4, "high": 0.625} for count in (3, 5)}
    return {
        "d_model": 64,
        "num_layers": 12,
        "proposed_layer": 7,
        "marker": {"found": "\u53f7", "id": 812, "neighbours": [8, 2], "configured": "\u320e"},
        "texts": {"train": 1_234, "validation": 56, "positions": "last"},
        "layers": {
            "4": inspected_layer(0.25, 150.0, {}),
            "7": inspected_layer(0.75, 222.25, probe),
        },
    } | changed


def called_with(**sections: Any) -> RunConfig:
    base = {"model": MODEL, "layer": 4, "dtype": "float32"}
    return override(START, **({"base": base, "capture": {"layers": (4, 7)}} | sections))


def commented(text: str, field: str) -> str:
    """The comment above a value, as one line."""
    lines = text.partition(f"\n{field} = ")[0].splitlines()
    above = itertools.takewhile(lambda line: line.startswith("#"), reversed(lines))
    return " ".join(line.removeprefix("# ") for line in reversed(list(above)))


def test_a_proposal_is_what_was_measured_and_what_the_inspection_was_called_with(
    tmp_path: Path,
) -> None:
    given = called_with(corpus={"path": "texts.jsonl"}, sft={"max_examples": 9})
    file = tmp_path / "mine.toml"
    file.write_text(proposal_text(results_of(), given, START, "runs/mine"), encoding="utf-8")
    expected = override(
        START,
        base={
            "model": MODEL,
            "layer": 7,
            "injection_norm": 250.0,
            "marker": "\u53f7",
            "dtype": "float32",
        },
        corpus={"path": "texts.jsonl"},
        sft={"max_examples": 9},
    )
    expected = dataclasses.replace(expected, preset=str(file), run_dir="runs/mine")
    assert load_preset(str(file)) == expected
    unnamed = proposal_text(results_of(), given, START, None)
    assert "run_dir" not in unnamed and "[base]" in unnamed


def test_every_measured_value_stands_below_its_measurement() -> None:
    text = proposal_text(results_of(), called_with(), START, None)
    head = commented(text, "preset")
    assert "1,234 train and 56 validation texts" in head and 'positions "last"' in head
    assert commented(text, "model") == "12 blocks, d_model 64."
    layers = commented(text, "layer")
    assert re.search(r"    4  0\.250 \[0\.150, 0\.350\] +- +- +150\.0 ", layers)
    assert re.search(r"    7  0\.750 \[0\.650, 0\.850\] +0\.500 \[0\.400, 0\.625\] +- ", layers)
    norm = commented(text, "injection_norm")
    assert norm == "The mean norm at layer 7, 222.2 (1% to 99%: 212.2 to 232.2), rounded up."
    marker = commented(text, "marker")
    assert marker.startswith("U+53F7, id 812: ") and "between the ids 8 and 2" in marker
    assert 'called with "\u320e"' in marker
    assert commented(text, "dtype") == ""
    assert max(map(len, text.splitlines())) <= 100


def test_a_linear_scorer_above_the_proposed_layer_is_left_out() -> None:
    for layer, kept in ((9, None), (7, 7), (3, 3)):
        given = called_with(base={"layer": 10}, linear_scorer={"layer": layer})
        assert proposed_config(results_of(), given, START).linear_scorer.layer == kept


def test_a_preset_file_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(dataclasses.replace(called_with(), run_dir=str(tmp_path / "my run")))
    file = write_preset(run, results_of(), START)
    assert Path(file.path) == tmp_path / "my run" / "preset.toml"
    assert load_preset(file.path).run_dir == "my run", "as it is typed where the job was started"
    assert write_preset(run, results_of(), START) == file and told == []
    edited = file.read_text() + "\n[grpo]\nsteps = 3\n"
    file.write_text(edited)
    second = write_preset(run, results_of(), START)
    assert Path(second.path).name == "preset_2.toml"
    assert file.read_text() == edited and "preset.toml says something else and is kept" in told[0]
    third = write_preset(run, results_of(proposed_layer=4), START)
    assert Path(third.path).name == "preset_3.toml" and load_preset(third.path).base.layer == 4
    assert write_preset(run, results_of(), START) == second
    # An inspection that starts from the edited file keeps what it says, and its named start.
    again = Run(parse_arguments("test", ["--preset", "my run/preset.toml"]))
    fourth = load_preset(write_preset(again, results_of(), START).path)
    assert fourth.grpo.steps == 3 and fourth.base == load_preset(file.path).base
    command = next_command(run, second).partition("; next: ")[2]
    assert shlex.split(command) == [
        "python",
        "jobs/pipeline.py",
        "--preset",
        "my run/preset_2.toml",
    ]


def test_a_preset_file_on_an_object_store_holds_no_password(s3_uri: Callable[[str], str]) -> None:
    run = Run(dataclasses.replace(called_with(), run_dir=s3_uri("proposed")))
    file = write_preset(run, results_of(), START)
    assert write_preset(run, results_of(), START) == file
    text = file.read_text()
    assert "run_dir" not in text and "layer = 7" in text
    _, _, command = next_command(run, file).partition("; copy it to this machine, then: ")
    expected = ["--preset", "preset.toml", "--run-dir", run.given.run_dir]
    assert shlex.split(command) == ["python", "jobs/pipeline.py", *expected]
