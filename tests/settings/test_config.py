"""Presets, overrides and plans: what a command line becomes, without a heavy import."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nla_ray.run.stages import stages_of_job
from nla_ray.settings.command_line import parse_arguments
from nla_ray.settings.config import (
    ExportRunConfig,
    PretrainRunConfig,
    RunConfig,
    config_hash,
    from_dict,
    to_dict,
)
from nla_ray.settings.presets import PRESETS, nano, override, preset

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
HEAVY = {"torch", "ray", "transformers", "datasets", "peft", "trl", "deepspeed"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_without_overrides_is_itself(name: str) -> None:
    assert parse_arguments("test", ["--preset", name]) == PRESETS[name]() == preset(name)
    assert parse_arguments("test", [f"--preset={name}"]) == PRESETS[name]()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_and_its_hash_is_stable(name: str) -> None:
    plain = to_dict(PRESETS[name]())
    assert json.loads(json.dumps(plain)) == plain
    assert from_dict(RunConfig, plain) == PRESETS[name]()
    assert (
        config_hash(PRESETS[name]())
        == config_hash(plain)
        == config_hash(json.loads(json.dumps(plain)))
    )
    assert len({config_hash(make()) for make in PRESETS.values()}) == len(PRESETS)


def test_the_published_recipe_of_the_7b_preset_differs_from_it_in_the_rate_of_sft_alone() -> None:
    public, scaled = PRESETS["qwen2.5-7b-public"](), PRESETS["qwen2.5-7b"]()
    assert public.sft.learning_rate == 1.4e-5
    # Between d_model's share of what was measured, and ten times a rate for all weights, halved.
    assert 10 * 5e-5 / 2 < scaled.sft.learning_rate < 3e-3 * 576 / 3_584
    assert scaled == dataclasses.replace(
        override(public, sft={"learning_rate": scaled.sft.learning_rate}),
        preset="qwen2.5-7b",
        run_dir="runs/qwen2.5-7b",
    )


def test_nano_is_what_runs_without_a_preset() -> None:
    assert parse_arguments("test", []) == nano()


def test_an_override_changes_its_field_and_no_other() -> None:
    flags = """
        --preset qwen2.5-7b --run-dir elsewhere
        --grpo.group-size 4 --grpo.contrast none
        --reward-scorer.lora.rank 16 --capture.layers 10 20
    """
    config = parse_arguments("test", flags.split())
    expected = PRESETS["qwen2.5-7b"]()
    lora = dataclasses.replace(expected.reward_scorer.lora, rank=16)
    expected = dataclasses.replace(
        override(
            expected,
            grpo={"group_size": 4, "contrast": "none"},
            reward_scorer={"lora": lora},
            capture={"layers": (10, 20)},
        ),
        run_dir="elsewhere",
    )
    assert config == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--preset", "nono"],
            ["unknown preset", "'nono'", "nano, smollm2-135m, qwen2.5-7b, qwen2.5-7b-public"],
        ),
        (["--grpo.group-sice", "4"], ["group-sice"]),
        (["--grpo.group-size", "four"], ["four"]),
        (["--grpo.group-size", "1"], ["grpo.group_size: got 1, expected at least 2"]),
        (
            ["--capture.positions", "first"],
            ["capture.positions: got 'first', expected `last`, `random:N`, `all`, `regex:PATTERN`"],
        ),
        (
            ["--capture.positions", "regex:a(b"],
            ["capture.positions: got 'regex:a(b', expected a regular expression", "`substring:"],
        ),
        (["--capture.positions", "random:0"], ["capture.positions: got 'random:0', expected"]),
        (["--capture.positions", "generated:"], ["capture.positions: got 'generated:', expected"]),
        (["--capture.answer-tokens", "0"], ["capture.answer_tokens: got 0, expected at least 1"]),
        (["--capture.positions", "mean:last"], ["capture.positions: got 'mean:last', expected"]),
        (["--capture.positions", "substring:"], ["capture.positions: got 'substring:', expected"]),
        (["--base.layer", "-1"], ["base.layer: got -1"]),
        (["--judge-scorer.document-half", "even"], ["two different halves"]),
        (["--grpo.claim-precision", "75"], ["grpo.claim_precision, grpo.claim_weight: got (75.0"]),
        (["--readable-labels.least", "1.2"], ["readable_labels.least: got 1.2, expected a"]),
        (["--seeds", "1", "1"], ["seeds: got (1, 1), expected each once"]),
    ],
)
def test_a_wrong_command_line_is_one_message_and_status_2(
    arguments: list[str], said: list[str], capsys
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments("test", arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    shown = " ".join((output.err + output.out).replace("│", " ").split())
    for part in said:
        assert part in shown
    assert "Traceback" not in shown


def test_every_field_of_the_configuration_is_described() -> None:
    tree = ast.parse((ROOT / "nla_ray" / "settings" / "config.py").read_text())
    checked = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node), f"{node.name} is described"
        for statement, following in itertools.pairwise([*node.body, None]):
            if isinstance(statement, ast.AnnAssign) and not is_section(statement):
                described = isinstance(following, ast.Expr)
                assert described, f"{node.name}.{ast.unparse(statement.target)} has no docstring"
                checked += 1
    assert checked > 100


def is_section(statement: ast.AnnAssign) -> bool:
    """Whether a field is a section, which its own class describes."""
    return re.search(r"\b\w+(Config|Settings)$", ast.unparse(statement.annotation)) is not None


def test_sections_stand_in_the_order_of_the_pipeline_and_pretraining_is_added_last() -> None:
    fields = [field.name for field in dataclasses.fields(RunConfig)]
    assert fields == [
        *("preset", "run_dir", "dry_run", "gate", "card", "compare", "seeds"),
        *("base", "corpus", "capture", "label", "reward_scorer", "judge_scorer", "linear_scorer"),
        *("readable_labels", "sft", "grpo", "reward_scorer_refreshed", "claim_confidence"),
        *("evaluation", "serve", "compute"),
    ]
    extended = [field.name for field in dataclasses.fields(PretrainRunConfig)]
    assert extended == [*fields, "pretrain"]
    exported = [field.name for field in dataclasses.fields(ExportRunConfig)]
    assert exported == [*fields, "export"]


def run_job_in_subprocess(job: str, *arguments: str) -> tuple[str, set[str]]:
    """Output of a job, and which heavy packages it had imported when it ended."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[f'jobs/{job}.py', *arguments]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('imported:', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output, _, imported = done.stdout.rpartition("imported:")
    return output, set(imported.split())


@pytest.mark.parametrize("job", JOBS)
def test_help_of_a_job_imports_nothing_heavy_and_pretraining_is_in_that_of_its_job(
    job: str,
) -> None:
    output, imported = run_job_in_subprocess(job, "--help")
    assert "--preset" in output and "--run-dir" in output
    assert ("--pretrain.steps" in output) == (job == "pretrain")
    assert imported == set()


@pytest.mark.parametrize("job", JOBS)
def test_a_dry_run_of_a_job_for_7b_needs_no_network_no_weights_and_no_torch(
    job: str, tmp_path: Path
) -> None:
    output, imported = run_job_in_subprocess(
        job, "--preset", "qwen2.5-7b", "--dry-run", "--run-dir", str(tmp_path / "run")
    )
    made = ("processes", "memory each", "files") if stages_of_job(job) else ("nothing is made",)
    if job not in ("corpus", "label", "pretrain"):  # they ask nothing of the base
        made = ("base Qwen/Qwen2.5-7B-Instruct: 7.62 billion parameters", *made)
    for part in made:
        assert part in output
    assert imported == set()
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"


def test_what_was_tried_for_nano_has_intervals_and_other_presets_tried_nothing() -> None:
    from nla_ray.report.cards import experiments

    tried = experiments("nano")
    assert {experiment["kept"] for experiment in tried} == {"yes", "no"}
    assert len({experiment["changed"] for experiment in tried}) == len(tried)
    for experiment in tried:
        for figure in experiment["minus_sft"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert experiments("qwen2.5-7b") == []
