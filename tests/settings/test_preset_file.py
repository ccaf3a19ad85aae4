"""Presets in files: the configuration that the same flags give, or one message."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tomllib
from pathlib import Path

import pytest

from nla_ray.report import cards
from nla_ray.settings.command_line import parse_arguments
from nla_ray.settings.config import PretrainRunConfig, RunConfig, to_dict
from nla_ray.settings.preset_file import (
    differing_settings,
    load_preset,
    start_preset,
    to_preset_file,
    toml_value,
)
from nla_ray.settings.presets import PRESETS, nano, override, preset

MINE = """
preset = "smollm2-135m"
run_dir = "runs/elsewhere"

[base]
model = 'some\\folder'
layer = 9
injection_norm = 500
marker = "号"

[capture]
layers = [3, 5]

[reward_scorer]
lora.rank = 16

[sft]
max_examples = 50

[grpo]
contrast = "none"
centred = false

[evaluation]
max_activations = "None"
gates = [["sft.judge.top1", ">=", 1]]
"""
FLAGS = [
    *("--preset", "smollm2-135m", "--run-dir", "runs/elsewhere"),
    *("--base.model", "some\\folder", "--base.layer", "9", "--base.injection-norm", "500"),
    *("--base.marker", "号", "--capture.layers", "3", "5", "--reward-scorer.lora.rank", "16"),
    *("--sft.max-examples", "50", "--grpo.contrast", "none", "--grpo.no-centred"),
    *("--evaluation.max-activations", "None", "--evaluation.gates", "sft.judge.top1", ">=", "1"),
]


def as_json(config: RunConfig) -> str:
    """What artifacts hash: here 500 and 500.0 differ."""
    return json.dumps(to_dict(config), sort_keys=True)


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line is refused with: status 2, and no word on standard output."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments("test", arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    return output.err


def test_a_file_gives_the_configuration_that_the_same_flags_give(tmp_path: Path) -> None:
    file = write(tmp_path, MINE)
    flags = dataclasses.replace(parse_arguments("test", FLAGS), preset=file)
    assert flags != dataclasses.replace(preset("smollm2-135m"), preset=file)
    for given in (["--preset", file], [f"--preset={file}"]):
        config = parse_arguments("test", given)
        assert config == flags
        assert as_json(config) == as_json(flags)
    pretraining = parse_arguments("test", ["--preset", file], PretrainRunConfig)
    assert pretraining == PretrainRunConfig.of(flags)


def test_flags_override_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, MINE)
    flags = ["--run", "here", "--base.layer", "7", "--sft.max-examples", "None"]
    changed = override(load_preset(file), base={"layer": 7}, sft={"max_examples": None})
    for arguments in (["--preset", file, *flags], [*flags, "--preset", file]):
        config = parse_arguments("test", arguments)
        assert config == dataclasses.replace(changed, run_dir="here")


def test_a_file_without_a_run_directory_has_one_by_its_name(tmp_path: Path) -> None:
    file = write(tmp_path, 'preset = "nano"\n', "other.toml")
    assert load_preset(file) == dataclasses.replace(nano(), preset=file, run_dir="runs/other")
    assert start_preset(file) == start_preset("nano") == nano()


def test_a_path_without_the_ending_is_a_file_and_a_file_may_begin_and_end_lines_as_editors_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_bytes(b'\xef\xbb\xbfpreset = "nano"\r\n[sft]\r\nepochs = 3\r\n')
    monkeypatch.chdir(tmp_path)
    assert load_preset("./mine").sft == dataclasses.replace(nano().sft, epochs=3)


@pytest.mark.parametrize(("start", "wanted"), list(itertools.permutations(PRESETS, 2)))
def test_what_differs_between_two_presets_survives_a_file(
    start: str, wanted: str, tmp_path: Path
) -> None:
    differing = differing_settings(PRESETS[wanted](), PRESETS[start]())
    sources = {f"{section}.{name}": ["why"] for section in differing for name in differing[section]}
    file = write(tmp_path, to_preset_file(["a head"], {"preset": start}, differing, sources))
    assert Path(file).read_text().count("\n# why\n") == len(sources) > 0
    expected = dataclasses.replace(PRESETS[wanted](), preset=file, run_dir="runs/mine")
    assert load_preset(file) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_can_stand_in_a_file(name: str, tmp_path: Path) -> None:
    sections: dict[str, dict[str, object]] = {}
    for section, fields in to_dict(PRESETS[name]()).items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            inner = value.items() if isinstance(value, dict) else ()
            flat = {f"{field}.{key}": deeper for key, deeper in inner} or {field: value}
            sections.setdefault(section, {}).update(flat)
    start = "nano" if name != "nano" else "qwen2.5-7b"
    file = write(tmp_path, to_preset_file([], {"preset": start}, sections, {}))
    expected = dataclasses.replace(PRESETS[name](), preset=file, run_dir="runs/mine")
    assert load_preset(file) == expected


@pytest.mark.parametrize(
    "text",
    [
        'C:\\new "models"\\u0041',
        "'''\"\"\"",
        "a\nb\r\tc\x00\x1b\x7f",
        "\u53f7\u320e\u200b\u202e\u0301\ufeff\u2028",
        "\U0001f600\U000e0001",
        "# no comment [base]",
        "",
    ],
)
def test_every_text_survives(text: str) -> None:
    written = toml_value(text)
    assert tomllib.loads(f"value = {written}") == {"value": text}
    assert written.isprintable()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "preset: got None, expected one of"),
        ('preset = "nono"', 'preset: got \'nono\', expected one of "nano", "smollm2-135m", '),
        ("preset = 3", "preset: got 3, expected text in quotes"),
        ('preset = "a.toml"', "preset: got 'a.toml', expected one of"),
        ('preset = "nano"\nrun_dir = 3', "run_dir: got 3, expected text in quotes"),
        ('preset = "nano"\ncard = true', "got 'card', expected preset, run_dir, or a section of"),
        ('preset = "nano"\n[bse]\nlayer = 3', "got 'bse', expected preset, run_dir, or a section"),
        ('preset = "nano"\nbase = 3', "base: got 3, expected a table: [base]"),
        ('preset = "nano"\n[[base]]\nlayer = 3', "base: got [{'layer': 3}], expected a table"),
        ('preset = "nano"\n[base]\nlayers = 3', "base: got 'layers', expected a setting of model,"),
        ('preset = "nano"\n[base]\nlayer = "3"', "base.layer: got '3', expected a whole number"),
        ('preset = "nano"\n[base]\nlayer = 3.0', "base.layer: got 3.0, expected a whole number"),
        ('preset = "nano"\n[base]\nlayer = true', "base.layer: got True, expected a whole number"),
        ('preset = "nano"\n[base]\nlayer = "None"', "base.layer: got 'None', expected a whole"),
        ('preset = "nano"\n[base]\nmarker = 5', "base.marker: got 5, expected text in quotes"),
        (
            'preset = "nano"\n[base]\ninjection_norm = true',
            "base.injection_norm: got True, expected a number",
        ),
        (
            f'preset = "nano"\n[base]\ninjection_norm = {10**400}',
            "expected a number. Correct the value.",
        ),
        (
            'preset = "nano"\n[base]\ninjection_norm = 0',
            "base.injection_norm: got 0.0, expected a positive norm",
        ),
        (
            'preset = "nano"\n[base]\ndtype = "int8"',
            'base.dtype: got \'int8\', expected one of "float32", "bfloat16"',
        ),
        (
            'preset = "nano"\n[compute]\nzero_stage = false',
            "compute.zero_stage: got False, expected one of 0, 2, 3",
        ),
        (
            'preset = "nano"\n[sft]\nmax_examples = "all"',
            "sft.max_examples: got 'all', expected a whole number or \"None\"",
        ),
        ('preset = "nano"\n[grpo]\ncentred = 1', "grpo.centred: got 1, expected true or false"),
        ('preset = "nano"\n[capture]\nlayers = 3', "got 3, expected a list, each a whole number"),
        ('preset = "nano"\n[capture]\nlayers = ["3"]', "got ['3'], expected a list, each a whole"),
        (
            'preset = "nano"\n[evaluation]\ngates = [["a", "="]]',
            "evaluation.gates: got [['a', '=']], expected a list, each a list of 3: text in quotes",
        ),
        ('preset = "nano"\n[sft]\nlora = 3', "sft.lora: got 3, expected lora.SETTING = VALUE"),
        (
            'preset = "nano"\n[sft]\nlora.rnk = 3',
            "sft.lora: got 'rnk', expected a setting of rank, alpha, dropout",
        ),
        (
            'preset = "nano"\n[linear_scorer]\nlayer = 9',
            "linear_scorer.layer: got 9, expected a block from 0 to base.layer = 4",
        ),
        ('preset = "nano\n', '(at line 1, column 15)", expected TOML in UTF-8'),
        ('preset = "nano"\npreset = "nano"', "got 'Cannot overwrite a value"),
        ('preset = "nano"\n[base]\nmodel = "C:\\models"', "expected TOML in UTF-8"),
    ],
)
def test_a_file_that_is_no_preset_is_one_message_and_status_2(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, text)
    message = refusal(["--preset", file], capsys)
    assert message.startswith(f"error: preset file {file}: ") and message.count("\n") == 1
    assert said in message


def test_a_file_that_cannot_be_read_is_one_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.toml").write_bytes('preset = "café"'.encode("latin-1"))
    for path, said in (
        (str(tmp_path / "none.toml"), "got 'no such file or directory', expected a TOML file"),
        (str(tmp_path), "got 'is a directory', expected a TOML file"),
        (str(tmp_path / "latin.toml"), "expected TOML in UTF-8"),
        ("s3://bucket/preset.toml", "got 'a URI', expected a local file"),
    ):
        message = refusal(["--preset", path], capsys)
        assert message.startswith(f"error: preset file {path}: ") and message.count("\n") == 1
        assert said in message


def test_a_preset_in_a_file_has_no_card_and_no_experiments_but_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, 'preset = "nano"')
    with pytest.raises(ValueError, match=r"--card, preset: got .*mine.toml', expected the name"):
        dataclasses.replace(load_preset(file), card=True)
    with pytest.raises(SystemExit) as caught:
        parse_arguments("test", ["--preset", file, "--card"])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "--card, preset: got" in output.out + output.err
    (tmp_path / "mine.toml_experiments.json").write_text("no JSON")
    assert cards.experiments(file) == []
    assert cards.experiments("nano") != []
