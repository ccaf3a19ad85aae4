"""The prompts of teachers: files of the package, or the user's, known by their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nla_ray.label.instructions import PROMPT_FOLDER, TeacherPrompt


@pytest.mark.parametrize("name", ["activation", "content"])
def test_a_prompt_of_this_project_takes_any_text_as_it_is(name: str) -> None:
    prompt = TeacherPrompt.load(name)
    text = "braces {0} {text} %s and\nlines"
    assert prompt.message(text) == prompt.template.replace("{text}", text, 1)
    assert f"<text>\n{text}\n</text>" in prompt.message(text)
    assert prompt.sha256 == hashlib.sha256((PROMPT_FOLDER / f"{name}.txt").read_bytes()).hexdigest()


def test_a_file_of_the_users_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("Say it in a line: {text}")
    second.write_text("Say it in a line: {text}")
    assert TeacherPrompt.load(str(first)) == TeacherPrompt.load(str(second))
    assert TeacherPrompt.load(str(first)).message("x") == "Say it in a line: x"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "expected activation or content, or a file"),
        (b"no place for the text", r"got '0 times \{text\}'"),
        (b"{text} and {text}", r"got '2 times \{text\}'"),
        (b"\xff{text}", "expected a file in UTF-8"),
    ],
)
def test_a_file_that_is_no_prompt_is_one_message(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        TeacherPrompt.load(str(path))
