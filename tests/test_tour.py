"""The tour names what exists, and its job says what a loaded run says."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nla_ray
from nla_ray.activation.stage import load_activations
from nla_ray.run.artifact import Run
from nla_ray.settings.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]


def test_every_step_of_the_tour_is_a_file_and_a_name_in_it() -> None:
    steps = re.findall(r"^ ?(\d+)\. .* (\S+\.py)::(\w+)$", nla_ray.__doc__, re.MULTILINE)
    assert [int(number) for number, _, _ in steps] == list(range(1, 11))
    for _, path, name in steps:
        body = ast.parse((ROOT / "nla_ray" / path).read_text()).body
        assert name in {getattr(node, "name", None) for node in body}, f"{path}::{name}"


def test_the_package_is_imported_without_what_is_heavy() -> None:
    heavy = {"torch", "ray", "numpy", "pyarrow"}
    code = f"import sys, nla_ray; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_tour_of_a_run_says_what_the_loaded_run_says(
    published_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("tour", ROOT / "jobs" / "tour.py")
    tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tour)
    run = Run(published_run)
    tour.body(run)
    shown = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"^ ?(\d+)\. ", shown, re.MULTILINE)] == list(
        range(1, 11)
    )
    test = load_activations(run, "test")
    width = test.vectors.shape[1]
    assert test.texts[0] in shown and shown.count(f"[1, {width}]") == 2
    explained = nla_ray.load(published_run.run_dir).explain(test.texts[0])
    [said] = explained.explanations
    assert said.description in shown
    assert f"centred cosine with v: {said.scores['judge'].centred_cosine:.3f}" in shown
