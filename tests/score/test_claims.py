"""What a description claims: items, repeats, salient words, precision, domain."""

from __future__ import annotations

import pytest

from nla_ray.label.cleaner import clean_label
from nla_ray.nano.offline_teachers import ContentFirstTeacher, FormatFirstTeacher
from nla_ray.score import claims
from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.text.words import WordStatistics

DESCRIPTION = (
    "- Python test: frame, index\n- tokens: assert, dtype, loadFrame\n- next: another check"
)
TEXT = "def test_frame():\n    assert loadFrame(df).dtype == 'int64'\n    # 2.5 items, Los Angeles"
NAMES = {
    "python_test": "Python test",
    "python_code": "Python code",
    "cython": "Cython",
    "cpp_source": "C++ source",
}


def test_items_are_the_comma_separated_parts_without_headings() -> None:
    assert claims.items(DESCRIPTION) == [
        "frame",
        "index",
        "assert",
        "dtype",
        "loadframe",
        "another check",
    ]


def test_items_of_prose_keep_the_words_before_a_colon() -> None:
    assert claims.items("- A poem about this: the sea at night, calm") == [
        "a poem about this: the sea at night",
        "calm",
    ]


@pytest.mark.parametrize(
    ("description", "repeats"),
    [
        (DESCRIPTION, False),
        ("- tokens: assert, assert, dtype", True),
        ("- Python test: frame\n- tokens: Frame", True),
        ("- tokens: assert assert dtype", True),
        ("- next: a call\n- next: a call", True),
        ("", False),
        ("- tokens: frame, frames", False),
    ],
)
def test_a_description_repeats_when_an_item_or_a_neighbouring_word_comes_twice(
    description: str, repeats: bool
) -> None:
    assert claims.repeats_item(description) is repeats


def test_claimed_words_of_the_list_form_leave_out_kind_headings_and_forecast() -> None:
    assert claims.claimed_words(DESCRIPTION) == {"frame", "index", "assert", "dtype", "load"}


def test_claimed_words_of_prose_are_content_words_names_numbers_and_quotes() -> None:
    prose = (
        '- The text is about cooking with Maria, 250 grams of "brown sugar"\n- likely to continue'
        " with a recipe"
    )
    assert claims.claimed_words(prose) == {
        "cooking",
        "maria",
        "250",
        "grams",
        "brown sugar",
        "recipe",
    }


def test_a_list_may_claim_a_word_that_prose_uses_about_any_text() -> None:
    assert claims.claimed_words("- tokens: model, token") == {"model", "token"}
    assert claims.claimed_words("- the model reads a token stream") == {"reads", "stream"}


def test_a_placeholder_claims_nothing() -> None:
    assert (
        claims.claimed_words("- tokens: no word stands out\n- Python test: nothing in particular")
        == frozenset()
    )


def test_words_of_a_text_are_found_whole_and_in_pieces() -> None:
    found = claims.found_words(TEXT)
    assert {"loadframe", "load", "frame", "test_frame", "test", "df", "2.5", "64"} <= found


def test_claim_precision_counts_each_distinct_claim_once() -> None:
    # frame, assert, dtype, load are in the text; index is not
    assert claims.claim_counts(DESCRIPTION, TEXT) == (4, 5)
    assert claims.claim_precision("- tokens: index, index, frame", TEXT) == pytest.approx(1 / 2)


def test_a_word_inside_another_word_is_not_found() -> None:
    assert claims.claim_counts("- tokens: frame", "a dataframes frameset") == (0, 1)


def test_a_quoted_string_is_found_only_as_a_whole() -> None:
    assert claims.claim_counts('- names "los  angeles"', TEXT) == (1, 2)
    assert claims.claim_counts('- names "angeles los"', TEXT) == (0, 2)


def test_a_number_must_be_the_same_number() -> None:
    assert claims.claim_counts("- tokens: 2.5", TEXT) == (1, 1)
    assert claims.claim_counts("- tokens: 12", "there are 412 rows") == (0, 1)


@pytest.mark.parametrize(
    "description", ["", "   ", "- next: another check", "- tokens: no word stands out"]
)
def test_a_description_that_claims_nothing_has_precision_zero(description: str) -> None:
    assert claims.claim_precision(description, TEXT) == 0.0


@pytest.mark.parametrize(
    ("description", "slug"),
    [
        (DESCRIPTION, "python_test"),
        ("- a Python code file on frames", "python_code"),
        ("- Cython: memory, view", "cython"),
        ("- C++ source: vector", "cpp_source"),
        ("- tokens: cython\n- Python code: view", "python_code"),
        ("- tokens: cython", None),
        ("- next: Python code", None),
        ("- Pythonic codes", None),
    ],
)
def test_the_named_domain_is_the_first_name_outside_tokens_and_next(
    description: str, slug: str | None
) -> None:
    assert claims.named_domain(description, NAMES) == slug


def test_of_two_names_at_one_place_the_longer_counts() -> None:
    assert (
        claims.named_domain("- C++ source file: x", {"a": "C++ source", "b": "C++ source file"})
        == "b"
    )


def test_domain_named_compares_with_the_true_domain() -> None:
    assert claims.domain_named(DESCRIPTION, "python_test", NAMES)
    assert not claims.domain_named(DESCRIPTION, "python_code", NAMES)


def test_words_outside_ascii_are_words() -> None:
    assert claims.claim_counts("- tokens: größe, 東京", "Die Größe von 東京") == (2, 2)


@pytest.mark.parametrize("teacher", [ContentFirstTeacher, FormatFirstTeacher])
def test_the_offline_teachers_claim_nothing_that_is_not_in_the_text(teacher: type) -> None:
    frequency = {
        word: 20 for word in ("test", "frame", "assert", "load", "dtype", "licence", "copy")
    }
    describe = teacher(WordStatistics(num_documents=200, document_frequency=frequency)).describe
    for text in (TEXT, "zzz qqq", ""):
        label = clean_label(describe(text, "python_test"))
        found, claimed = claims.claim_counts(label, text)
        assert found == claimed and (claimed > 0) == (text == TEXT)
        assert claims.domain_named(label, "python_test", DOMAIN_NAMES) and not claims.repeats_item(
            label
        )


# Specifics, quotes, marks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (
            'mentions Alice and "two words" in 1984, near df_test',
            {"alice", "two words", "1984", "df_test"},
        ),
        (
            "- Python test: frame, index\n- tokens: assert, row id\n- next: 12 more",
            {"assert", "row id"},
        ),
        ('- tokens: "assert", "row, id", frame', {"assert", "row, id", "frame"}),
        ("- tokens: no word stands out", set()),
        ("The text calls readFrame of x1", {"readframe", "x1"}),
    ],
)
def test_specifics_are_quoted_strings_numbers_names_and_listed_tokens(
    description: str, expected: set[str]
) -> None:
    assert claims.specifics(description) == expected


def test_a_specific_is_missing_when_the_text_does_not_have_it() -> None:
    assert claims.missing_specifics(
        '"two words" and "one word", 12 and 13', "it has two  Words and 13"
    ) == (2, 4)
    assert claims.missing_specifics("a plain sentence", "anything") == (0, 0)


def test_stripping_quotes_leaves_the_rest_and_its_lines() -> None:
    assert (
        claims.strip_quotes('- mentions "exactly this" and more\n- it\'s kept')
        == "- mentions and more\n- it's kept"
    )


def test_similarity_is_one_for_the_same_words_and_zero_for_none_shared() -> None:
    assert claims.similarity("- licence: copy, terms", "- licence: terms, copy") == 1.0
    assert claims.similarity("- alpha", "- beta") == 0.0 and claims.similarity("", "") == 1.0
    assert claims.similarity("- alpha beta", "- beta gamma") == pytest.approx(1 / 3)


def test_recall_of_a_texts_words_and_the_share_beyond_ascii() -> None:
    assert (
        claims.source_recall("- licence: copy, terms", ["copy", "permit"]) == 0.5
        and claims.source_recall("- a", []) == 0.0
    )
    assert claims.non_ascii_share("ab\u4e2d\u6587") == 0.5 and claims.non_ascii_share("") == 0.0


@pytest.mark.parametrize(
    "description",
    [
        '- Python test: frame, qux\n- tokens: readFrame, "two words" 12\n- next: another check',
        "1. Prose about \u4e2d\u6587 and the frame, \u00e9t\u00e9 and FRAME\n\n- next: frame",
        "",
        "frame",
        "- a: b: c\n  \n- frame frame",
        "- qux test: test, frame",
    ],
)
def test_marked_pieces_join_to_the_description_and_mark_exactly_its_claims(
    description: str,
) -> None:
    text = "def frame two  words 12"
    pieces = claims.marked(description, text)
    assert "".join(piece for piece, _ in pieces) == description
    found = {
        " ".join(piece.strip("\"'").casefold().split()) for piece, mark in pieces if mark == "found"
    }
    missing = {
        " ".join(piece.strip("\"'").casefold().split())
        for piece, mark in pieces
        if mark == "missing"
    }
    assert found | missing == claims.claimed_words(description) and not found & missing
    count, made = claims.claim_counts(description, text)
    assert (len(found), len(found) + len(missing)) == (count, made)
