"""Wrapping a description in tags and reading it back, and the prompts as strings."""

import pytest
from tiny import MARKER, build_tokenizer

from nla_ray.base import prompts
from nla_ray.base.prompts import parse_description, wrap_description


def test_a_wrapped_description_reads_back_as_it_was() -> None:
    assert wrap_description("  - a test\n- code \n") == "- a test\n- code</description>"
    assert parse_description(wrap_description("- a test\n- code")) == ("- a test\n- code", True)


@pytest.mark.parametrize(
    "written, text, closed",
    [
        ("- a test", "- a test", False),
        ("", "", False),
        ("</description>", "", True),
        (" - a </description> and more</description>", "- a", True),
        ("<description>- a</description>", "- a", True),
        ("- a <description> inside</description>", "- a <description> inside", True),
        ("- a </descrip", "- a </descrip", False),
    ],
)
def test_parsing_stops_at_the_first_closing_tag_and_keeps_what_has_none(
    written: str, text: str, closed: bool
) -> None:
    assert parse_description(written) == (text, closed)


def test_the_reconstructor_prompt_ends_in_the_only_marker_even_when_the_description_holds_one() -> (
    None
):
    prompt = prompts.reconstructor_prompt(f" - a {MARKER} test\n", MARKER)
    assert prompt == f"- a  test\nActivation: {MARKER}"


def test_a_description_with_braces_is_not_taken_for_a_template() -> None:
    assert (
        prompts.reconstructor_prompt("- f'{x}' and {description}", "#")
        == "- f'{x}' and {description}\nActivation: #"
    )


def test_the_verbalizer_prompt_is_one_user_turn_that_ends_in_the_opening_tag() -> None:
    prompt = prompts.verbalizer_prompt(build_tokenizer(), MARKER)
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith(f"{MARKER}<|im_end|>\n<|im_start|>assistant\n<description>")


def test_a_chat_prompt_carries_the_text_unchanged_and_ends_in_the_generation_prompt() -> None:
    text = "  two\n\nlines {{ with }} braces "
    assert (
        prompts.chat_prompt(build_tokenizer(), text)
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
