"""Rewordings keep what is claimed: they change its order, or words for words of one meaning."""

from __future__ import annotations

from collections import Counter

import pytest

from nla_ray.score.claims import claimed_words
from nla_ray.score.rewording import FORMS, SYNONYMS, bullets_reversed, order_shuffled, synonyms_put

LISTS = "- unit test: index, frame\n- next: another check, then more\n- tokens: assert, loadFrame"
PROSE = '- A story opens. It rains! Who comes?\n- tokens: "rain, wind", storm'


@pytest.mark.parametrize("description", [LISTS, PROSE])
def test_another_order_claims_the_same(description: str) -> None:
    for form in (bullets_reversed, order_shuffled):
        reworded = form(description)
        assert reworded != description
        assert claimed_words(reworded) == claimed_words(description)
        assert Counter(reworded.replace(",", "").split()) == Counter(
            description.replace(",", "").split()
        )


def test_bullets_sentences_and_items_move_and_a_forecast_stays_whole() -> None:
    drawn = {order_shuffled(f"{LISTS}{number}") for number in range(60)}
    assert any(text.startswith("- tokens:") for text in drawn)
    assert any("unit test: frame, index" in text for text in drawn)
    assert all("- next: another check, then more" in text for text in drawn)
    sentences = {order_shuffled(PROSE.replace("storm", f"storm{number}")) for number in range(60)}
    assert any("It rains! A story opens." in text for text in sentences)
    assert all('"rain, wind"' in text for text in sentences)


def test_the_same_description_is_always_shuffled_alike() -> None:
    assert order_shuffled(LISTS) == order_shuffled(LISTS)


def test_nothing_remains_nothing() -> None:
    assert [form("") for form in FORMS.values()] == [""] * len(FORMS)


def test_a_synonym_stands_for_a_whole_word_and_takes_its_capital() -> None:
    assert synonyms_put("- Unit test: test_case, tests") == "- Unit trial: test_case, tests"
    assert synonyms_put("The model's tone. Likely next") == "The model's manner. Probably then"
    assert synonyms_put("API api") == "interface api"


def test_no_synonym_is_its_own_word_or_replaced_again_by_the_table() -> None:
    for word, synonym in SYNONYMS.items():
        assert word != synonym and synonyms_put(word) == synonym
