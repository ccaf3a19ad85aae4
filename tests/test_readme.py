"""The README is short, names what exists, runs, and quotes the cards."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from nla_ray.settings.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "nla_ray" / "cards" / "nano.md").read_text(encoding="utf-8")
FIGURE = re.compile(r"\d*\.\d+(?: \[-?\d*\.\d+, -?\d*\.\d+\])?")


def block(name: str) -> str:
    """What stands behind `<!-- name -->`, up to the first empty line."""
    return re.search(f"<!-- {name} -->\n(.*?)\n\n", README, re.DOTALL)[1]


def test_it_is_read_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 16_000


def test_every_figure_of_the_results_stands_in_the_card_of_the_same_verbalizer() -> None:
    rows = re.findall(r"^\| (?!verbalizer|---)([^|]+) \|(.*)\|$", block("results"), re.MULTILINE)
    assert len(rows) == 4
    for name, cells in rows:
        of_verbalizer = [line for line in CARD.splitlines() if line.startswith(f"| {name} |")]
        figures = FIGURE.findall(cells)
        assert figures and of_verbalizer, name
        for figure in figures:
            assert any(f" {figure} " in line for line in of_verbalizer), f"{name}: {figure}"


def test_it_says_how_many_gates_pass_as_the_card_does() -> None:
    [gates] = re.findall(r"\d+ of \d+ gates", README)
    assert f"- {gates} passed" in CARD


def test_the_example_is_the_cards() -> None:
    example = block("example").strip()
    assert FIGURE.search(example)
    for line in example.splitlines():
        assert line in CARD.splitlines(), line


def test_every_file_and_name_of_the_life_of_an_activation_exists() -> None:
    found = re.findall(r"([\w/]+\.py)::(\w+)", README)
    assert len(found) > 10
    for path, name in found:
        names = {
            getattr(node, "name", None)
            for node in ast.parse((ROOT / "nla_ray" / path).read_text()).body
        }
        assert name in names, f"{path}::{name}"


def test_every_file_it_sends_a_reader_to_exists() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", README):
        assert (ROOT / path).is_file() or (ROOT / "nla_ray" / path).is_file(), path


def test_its_python_runs(published_run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 6
    exec(code.replace("runs/nano", published_run.run_dir), {})
    description, confidence, score = capsys.readouterr().out.rsplit("\n", 3)[:3]
    assert isinstance(description, str) and -1 <= float(confidence) <= 1 and -1 <= float(score) <= 1
