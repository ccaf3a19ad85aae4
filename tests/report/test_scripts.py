"""The scripts of the report page: their own tests under Node, and what makes one script of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from nla_ray.report.rendering.page import SCRIPTS, joined_scripts

NODE = shutil.which("node")
TESTS = sorted(Path(__file__).parent.glob("*.test.mjs"))
needs_node = pytest.mark.skipif(NODE is None, reason="no Node on this machine")


@needs_node
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_scripts_pass_their_own_tests(path: Path) -> None:
    done = subprocess.run(
        [str(NODE), "--test", str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_node
def test_the_joined_scripts_are_a_program(tmp_path: Path) -> None:
    path = tmp_path / "page.mjs"
    path.write_text(joined_scripts(), encoding="utf-8")
    subprocess.run([str(NODE), "--check", str(path)], check=True, timeout=120)


def test_the_joined_scripts_name_nothing_twice_and_load_nothing() -> None:
    script = joined_scripts()
    declared = re.findall(r"^(?:function|const|let|class) (\w+)", script, re.MULTILINE)
    assert sorted(set(declared)) == sorted(declared) and "lineChart" in declared
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)


def test_lines_of_scripts_style_and_their_tests_end_at_100_columns() -> None:
    folder = files("nla_ray.report.rendering")
    sources = [folder.joinpath(name) for name in (*SCRIPTS, "page.css", "page.html")]
    for source in [*sources, *Path(__file__).parent.glob("*.mjs")]:
        lines = source.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 100] == [], source.name
