"""Labels without what cannot be read: what is dropped, and what takes its place."""

from __future__ import annotations

from nla_ray.score import claims
from nla_ray.score.readable import (
    Rewritten,
    label_difference,
    leave_out,
    offered_words,
    places_of,
    rewrite,
)

LABEL = "- tokens: frame, licence\n- unit test: index\n- next: another check"
LABELS = [
    *["- tokens: frame, array\n- unit test: index"] * 3,
    *["- tokens: licence, dtype\n- unit test: series"] * 4,
    "- tokens: rare",
]
PLACES = places_of(LABELS)


def rewritten(
    label: str = LABEL,
    likely: str = "",
    offers: str = "",
    least: float = 0.5,
    seed: int = 0,
    fill_to: int = 0,
) -> Rewritten:
    """`likely`: words of probability .9; others of `offers` have .2."""
    probability = {**dict.fromkeys(offers.split(), 0.2), **dict.fromkeys(likely.split(), 0.9)}
    return rewrite(
        label, probability, offers.split(), PLACES, least=least, seed=seed, fill_to=fill_to
    )


def test_words_belong_to_the_place_where_labels_name_them_most_often() -> None:
    assert {
        **dict.fromkeys(("frame", "array", "licence", "dtype", "rare"), "tokens"),
        **dict.fromkeys(("index", "series"), "other"),
    } == PLACES
    assert places_of([*LABELS, *["- unit test: frame"] * 4])["frame"] == "other"


def test_words_are_offered_by_what_they_tell_and_only_those_that_the_activation_tells_of() -> None:
    probability = {"the": 1.0, "frame": 0.6, "dtype": 0.3, "index": 0.6}
    share = {"the": 0.9, "frame": 0.2, "dtype": 0.01, "index": 0.2}
    assert offered_words(["the", "index", "frame", "dtype", "other"], probability, share) == [
        "dtype",
        "frame",
        "index",
        "the",
    ]


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
    ), "what is offered first stands first"
    assert claims.claimed_words(made.replaced) <= {"dtype", "series", "frame"}


def test_a_word_of_another_place_is_better_than_none_and_one_of_no_label_is_a_token() -> None:
    assert (
        "- unit test: array"
        in rewritten(likely="array frame licence", offers="array frame").replaced
    )
    made = rewritten(likely="unheard frame series", offers="unheard frame series")
    assert made.replaced == "- tokens: unheard, frame\n- unit test: series\n- next: another check"


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


PROSE = """- Reads a licence of Alice in 1984, step by step
- "dear sir" and Bob, then Carol
- a polite letter, most of all"""


def test_a_line_of_prose_stays_where_its_specifics_can_be_read() -> None:
    made = rewritten(PROSE)
    assert made.readable == made.replaced == "- a polite letter, most of all"
    assert (made.items, made.unreadable) == (2, 2)
    assert len(claims.bullets(made.thinned)) == 1
    label = "- a licence of Alice, step by step"
    assert rewritten(label, "alice licence", "alice licence").replaced == label
    assert "Alice" not in rewritten(label, "alice licence", "licence").replaced, "not in the text"
    assert "Alice" not in rewritten(label, "licence", "alice licence").replaced, "not readable"


def test_the_last_line_of_prose_is_kept_without_its_specifics() -> None:
    made = rewritten("\n".join(PROSE.splitlines()[:2]))
    assert made.readable == made.replaced == "- Reads a licence of in, step by step"
    assert rewritten('- "Alice"').readable == "- tokens: no word stands out"


def test_words_take_the_place_of_specifics_behind_the_prose() -> None:
    words = "frame dtype series array index"
    assert rewritten(PROSE, words, words).replaced == (
        "- a polite letter, most of all\n- tokens: frame, dtype, series, array, index"
    )
    assert rewritten(PROSE, "frame", words).replaced.endswith("- tokens: frame")
    plain = "- discusses a frame and an index in a licence\n- next: a list"
    assert rewritten(plain, words, words).replaced == plain, "it has none"
    assert rewritten(plain, words, words, fill_to=2).replaced == (
        "- discusses a frame and an index in a licence\n- tokens: frame, dtype\n- next: a list"
    )


def test_prose_that_is_left_is_not_followed_by_a_word_that_cannot_be_read() -> None:
    prose = "- explains a rule to a beginner"
    made = rewrite(f'{prose}\n- then quotes "a line of it"', {}, ["frame"], {}, least=0.5, seed=0)
    assert made.replaced == prose


def test_a_difference_is_what_the_first_label_alone_says() -> None:
    first = "- tokens: frame, index\n- unit test: dtype\n- next: another check"
    second = "- tokens: index, licence\n- unit test: dtype\n- next: a list"
    assert label_difference(first, second) == "- tokens: frame\n- next: another check"
    assert label_difference(first, first) == "- tokens: no word stands out"
    rust = "- explains how Rust ownership moves values\n- asks of Alice and 1984"
    bread = "- explains how to bake bread\n- greets Alice\n- in 1984"
    assert label_difference(rust, bread) == "- explains how Rust ownership moves values"
    assert label_difference(rust, "- explains how to bake bread") == rust


def test_the_control_takes_specifics_out_of_the_last_line_of_prose_as_well() -> None:
    made = rewritten("- explains ownership in 3 steps")
    assert made.thinned == made.readable == "- explains ownership in steps"


def test_a_label_never_becomes_nothing() -> None:
    made = rewritten("- tokens: licence")
    assert made.readable == "- tokens: no word stands out"


def test_words_that_the_teacher_left_out_are_added_up_to_a_number_of_claims() -> None:
    words = "array series frame dtype"
    made = rewritten(likely=f"index {words}", offers=words, fill_to=4)
    assert (
        made.replaced == "- tokens: array, series, frame\n- unit test: index\n- next: another check"
    )
    assert (made.readable, made.items, made.unreadable) == (
        "- tokens: frame\n- unit test: index\n- next: another check",
        3,
        1,
    )
    assert rewritten(likely=f"index {words}", offers=words, fill_to=2).replaced == (
        rewritten(likely=f"index {words}", offers=words).replaced
    ), "what was dropped is replaced whatever the number"
    silent = rewritten(
        "- tokens: no word stands out", "frame dtype", "frame dtype licence", fill_to=9
    )
    assert silent.replaced == "- tokens: frame, dtype", "no word that cannot be read"
    headed = rewritten("- unit test: index\n- next: a list", "index frame", "frame", fill_to=2)
    assert headed.replaced == "- unit test: index\n- tokens: frame\n- next: a list"
    last = rewritten("- next: a list\n- tokens: index", "index frame", "frame index", fill_to=2)
    assert last.replaced == "- next: a list\n- tokens: frame, index"
    prose = "- a licence\n- reads rare\n- next: a list"
    listed = rewritten(prose, "frame dtype", "frame dtype", fill_to=2).replaced
    assert listed == f"{prose[:-14]}- tokens: frame, dtype\n- next: a list", "before the forecast"
    assert not claims.repeats_item(made.replaced)


def test_what_claims_something_unwanted_is_left_out() -> None:
    label = "- tokens: frame, index, 42\n- unit test: dtype\n- reads a licence\n- next: frame"
    assert leave_out(label, []) == label
    assert leave_out(label, ["frame", "42"]) == (
        "- tokens: index\n- unit test: dtype\n- reads a licence\n- next: frame"
    ), "a forecast is no claim"
    assert leave_out(label, ["dtype", "licence", "frame", "index", "42"]) == (
        "- tokens: no word stands out\n- unit test: no word stands out\n- next: frame"
    )
