"""Credit by claim: which tokens are paid, and that neither silence nor repetition pays."""

from __future__ import annotations

import math

import pytest

from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.reinforce.claim_credit import ClaimPrices, claim_values

TEXTS = ["the frame and index", "a frame", "dtype", "frame dtype", "series", "x", "y", "z"]
PRICES = ClaimPrices.of(TEXTS, precision=0.75)


def values(
    pieces: list[str], source: str, prices: ClaimPrices = PRICES, without: str = ""
) -> list[float]:
    """Of tokens that are spelled like this."""
    numbers = list(range(len(pieces)))
    return claim_values(
        numbers, lambda ids: "".join(pieces[number] for number in ids), source, prices, without
    )


def test_a_word_weighs_by_how_few_texts_have_it() -> None:
    assert PRICES.value("index", found=True) == pytest.approx(0.25)
    assert PRICES.value("index", found=False) == pytest.approx(-0.75)
    assert PRICES.value("frame", found=True) == pytest.approx(0.25 * math.log(8 / 3) / math.log(8))
    assert PRICES.value("unheard", found=False) == PRICES.value("index", found=False)
    everywhere = ClaimPrices.of(["frame"] * 5, precision=0.75)
    assert everywhere.value("frame", found=True) == everywhere.value("frame", found=False) == 0.0


def test_at_the_chosen_precision_saying_a_word_pays_nothing_on_average() -> None:
    found, missing = PRICES.value("index", found=True), PRICES.value("index", found=False)
    assert 0.75 * found + 0.25 * missing == pytest.approx(0.0)
    assert 0.8 * found + 0.2 * missing > 0 > 0.7 * found + 0.3 * missing


def test_the_tokens_of_a_claim_and_those_that_lead_to_it_are_paid_and_others_are_not() -> None:
    pieces = ["-", " tokens", ":", " ind", "ex", ",", " dtype", "\n", "-", " next", ":", " frame"]
    paid = values(pieces, "an index")
    found, missing = PRICES.value("index", found=True), PRICES.value("dtype", found=False)
    expected = [0, 0, 0, found, found, missing, missing, 0, 0, 0, 0, 0]
    assert paid == pytest.approx(expected)


def test_of_a_difference_a_word_that_both_texts_have_counts_as_not_found() -> None:
    pieces = ["-", " tokens", ":", " index", ",", " dtype"]
    found, missing = PRICES.value("index", found=True), PRICES.value("dtype", found=False)
    paid = values(pieces, "an index, dtype", without="a frame of dtype")
    assert paid == pytest.approx([0, 0, 0, found, missing, missing])


def test_what_stands_after_the_closing_tag_and_in_a_heading_is_not_paid() -> None:
    assert values(["- frame: ", "index", CLOSING_TAG, " dtype"], "index dtype") == pytest.approx(
        [0.0, 0.25, 0.0, 0.0]
    )


def test_saying_a_word_again_costs_the_most_and_the_tokens_before_it_nothing() -> None:
    paid = values(["- tokens: ", "index", ", ", "index", ", ", "dtype"], "index")
    missing = PRICES.value("dtype", found=False)
    assert paid == pytest.approx([0.0, 0.25, 0.0, -1.0, missing, missing])
    everywhere = ClaimPrices.of(["frame"] * 5, precision=0.75)
    assert values(["- tokens: ", "frame", ", ", "frame"], "frame", everywhere)[3] == -1.0


def test_quotation_marks_make_a_word_neither_rarer_nor_new() -> None:
    plain, quoted = (
        values(["- tokens: ", "frame"], "frame"),
        values(["- tokens: ", '"frame"'], "frame"),
    )
    assert plain == pytest.approx(quoted)
    again = values(["- mentions ", "frame", " and ", '"frame"'], "the frame")
    assert again[1] == pytest.approx(PRICES.value("frame", found=True))
    assert again[3] == -1.0
    assert PRICES.value("the frame", found=True) == PRICES.value("the", found=True)
    assert PRICES.value("frame dtype", found=True) == PRICES.value("dtype", found=True)


def test_a_character_of_several_tokens_is_paid_where_it_is_whole() -> None:
    spelled = {1: "- tokens: \ufffd", 2: "- tokens: \u6f22", 3: "- tokens: \u6f22, index"}
    paid = claim_values([0, 1, 2], lambda ids: spelled.get(len(ids), ""), "\u6f22", PRICES)
    assert paid == pytest.approx([0.0, 0.25, -0.75])


def test_silence_earns_nothing() -> None:
    assert (
        values(["- tokens: ", "no word", " stands out", "\n- next: ", "a list"], "frame")
        == [0.0] * 5
    )
    assert values([], "frame") == []


def test_words_and_quotations_of_prose_are_claims_of_their_own() -> None:
    paid = values(["- mentions ", "a series", " and ", '"two words"'], 'he said "two words"')
    assert paid[1] == pytest.approx(PRICES.value("series", found=False))
    assert paid[3] == pytest.approx(PRICES.value("two words", found=True))
