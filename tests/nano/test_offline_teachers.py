"""The two offline teachers: the same facts in two styles."""

import pytest
from tiny import WORD_STATISTICS, WORDY_TEXT

from nla_ray.label.cleaner import clean_label
from nla_ray.nano.offline_teachers import (
    ContentFirstTeacher,
    FormatFirstTeacher,
    TextFacts,
    describe_ending,
    observe,
)


def test_a_text_is_told_by_the_best_word_of_every_band() -> None:
    facts = observe(WORDY_TEXT, "python_test", WORD_STATISTICS)
    assert facts == TextFacts(
        kind="unit test",
        topics=["result"],
        tokens=["expected", "frame"],
        ending="the rest of a sentence",
    )


def test_a_band_without_a_word_of_the_text_stays_empty() -> None:
    facts = observe("dtype of the index", "python_test", WORD_STATISTICS)
    assert (facts.topics, facts.tokens) == ([], ["dtype"])


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("for row in rows:", "the body of an opened block"),
        ("call(a,", "the next item of an open list"),
        ("x = 3\n}\n", "a new part after a closed block"),
        ("#include <vector>", "a preprocessor line"),
        ("    # a remark", "more of a comment"),
        (">>> f(1)", "the output of an example"),
        ("- a first point", "another list item"),
        ("    return x", "a new function or branch"),
        ("assert x == 1", "another check"),
        ("int x;", "another statement or member"),
        ("x = 3", "another assignment"),
        ("That was all.", "a new sentence"),
        ("run(x)", "another call"),
        ("        deeper", "more of an indented block"),
        ("and so the", "the rest of a sentence"),
        ("", "the rest of a sentence"),
    ],
)
def test_the_end_of_a_text_says_how_it_goes_on(text: str, ending: str) -> None:
    assert describe_ending(text) == ending


def test_the_two_teachers_say_the_same_facts_in_clearly_different_form() -> None:
    content, form = (
        ContentFirstTeacher(WORD_STATISTICS).describe(WORDY_TEXT, "python_test"),
        FormatFirstTeacher(WORD_STATISTICS).describe(WORDY_TEXT, "python_test"),
    )
    assert content.startswith("1. **Tokens**: expected, frame.")
    assert form.startswith(
        "This text appears to be unit test on result. The model is likely to continue"
    )


def test_the_cleaned_forms_differ_in_order_only() -> None:
    content = clean_label(
        ContentFirstTeacher(WORD_STATISTICS).describe(WORDY_TEXT, "python_test")
    ).splitlines()
    form = clean_label(
        FormatFirstTeacher(WORD_STATISTICS).describe(WORDY_TEXT, "python_test")
    ).splitlines()
    assert content[0] == form[2] and content[0].startswith("- tokens: ")
    assert content[1] == form[0] == "- unit test: result"
    assert content[2] == form[1] == "- next: the rest of a sentence"


def test_a_text_without_a_word_to_name_still_has_a_label() -> None:
    label = clean_label(ContentFirstTeacher(WORD_STATISTICS).describe("zzz", "licence"))
    assert (
        label
        == "- tokens: no word stands out\n- licence: nothing in particular\n- next: the rest of a"
        " sentence"
    )
