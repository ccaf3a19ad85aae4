"""Labels without what cannot be read: what is dropped, and what takes its place."""

from __future__ import annotations

import pytest

from nla_ray.score import claims
from nla_ray.score.readable import LabelWords, Rewritten, rewrite

LABEL = "- tokens: frame, licence\n- unit test: index\n- next: another check"
LABELS = [
    *["- tokens: frame, array\n- unit test: index"] * 3,
    *["- tokens: licence, dtype\n- unit test: series"] * 4,
    "- tokens: rare",
]
WORDS = LabelWords.of(LABELS)


def rewritten(
    label: str = LABEL, likely: str = "", offers: str = "", least: float = 0.5, seed: int = 0
) -> Rewritten:
    """`likely`: words of probability .9; others of `offers` have .2."""
    probability = {**dict.fromkeys(offers.split(), 0.2), **dict.fromkeys(likely.split(), 0.9)}
    return rewrite(label, probability, offers.split(), WORDS, least, seed)


def test_words_belong_to_the_place_where_labels_name_them_and_rare_ones_to_none() -> None:
    assert WORDS.place_of == {
        **dict.fromkeys(("frame", "array", "licence", "dtype"), "tokens"),
        **dict.fromkeys(("index", "series"), "other"),
    }
    assert WORDS.counts["frame"] == 3 and WORDS.counts["series"] == 4


def test_a_label_that_can_be_read_stays_what_it_is_in_every_form() -> None:
    made = rewritten(likely="frame licence index")
    assert (made.readable, made.thinned) == (LABEL, LABEL)
    assert claims.claimed_words(made.replaced) == claims.claimed_words(LABEL)
    assert (made.items, made.unreadable) == (3, 0)


def test_what_cannot_be_read_is_dropped_and_a_forecast_is_no_claim() -> None:
    made = rewritten(likely="frame")
    assert made.readable == (
        "- tokens: frame\n- unit test: no word stands out\n- next: another check"
    )
    assert (made.items, made.unreadable) == (3, 2)
    assert claims.claimed_words(made.readable) == {"frame"}


def test_readable_words_of_the_text_take_its_place_the_likeliest_of_that_place_first() -> None:
    made = rewritten(likely="frame series dtype array", offers="dtype series array frame")
    assert made.replaced == (
        "- tokens: dtype, frame\n- unit test: series\n- next: another check"
    ), "the more common word stands first"
    assert claims.claimed_words(made.replaced) <= {"dtype", "series", "frame"}


def test_a_word_of_another_place_is_better_than_none_and_one_that_no_label_uses_is_not() -> None:
    assert (
        "- unit test: array"
        in rewritten(likely="array frame licence", offers="array frame").replaced
    )
    made = rewritten(likely="unheard rare frame", offers="unheard rare frame")
    assert claims.claimed_words(made.replaced) == {"frame"}


def test_no_word_is_named_twice_and_no_more_are_named_than_before() -> None:
    made = rewritten(likely="frame array dtype index", offers="frame index dtype array")
    assert not claims.repeats_item(made.replaced)
    assert len(claims.claimed_words(made.replaced)) == 3


def test_a_label_of_which_nothing_can_be_read_names_the_likeliest_word_all_the_same() -> None:
    made = rewritten(offers="series dtype")
    assert claims.claimed_words(made.readable) == frozenset()
    assert claims.claimed_words(made.replaced) == {"series"}
    assert claims.claimed_words(rewritten().replaced) == frozenset(), "the text has none"
    made = rewritten("- tokens: rare", offers="index frame")
    assert made.replaced == "- tokens: index", "whatever the place"


def test_a_word_of_the_forecast_is_not_named_as_well() -> None:
    made = rewritten("- tokens: licence\n- next: frame", likely="frame dtype", offers="frame dtype")
    assert made.replaced == "- tokens: dtype\n- next: frame"


def test_the_control_drops_as_many_at_random_by_seed() -> None:
    several = {rewritten(likely="frame", seed=seed).thinned for seed in range(20)}
    assert len(several) == 3, "each of the three items is the one that is kept"
    assert {len(claims.claimed_words(text)) for text in several} == {1}
    assert rewritten(likely="frame", seed=4) == rewritten(likely="frame", seed=4)


@pytest.mark.parametrize(
    ("likely", "replaced"),
    [
        ("frame index", "- discusses a frame and an index in a licence\n- next: a list"),
        ("dtype", "- tokens: dtype\n- next: a list"),
        ("", "- tokens: dtype\n- next: a list"),
    ],
)
def test_prose_stays_where_half_of_its_words_can_be_read_and_else_becomes_a_list(
    likely: str, replaced: str
) -> None:
    label = "- discusses a frame and an index in a licence\n- next: a list"
    assert rewritten(label, likely, offers="dtype").replaced == replaced


def test_a_label_never_becomes_nothing() -> None:
    made = rewritten("- discusses a licence")
    assert made.readable == "- tokens: no word stands out"
