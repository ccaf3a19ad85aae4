"""The extractive summary: sentences of the text alone, those with rare words first."""

from __future__ import annotations

from nla_ray.text.summary import extract_summary
from nla_ray.text.words import WordStatistics

STATISTICS = WordStatistics(
    num_documents=100, document_frequency={"rare": 2, "known": 20, "everywhere": 90}
)


def test_sentences_are_ordered_by_the_mean_weight_of_their_words() -> None:
    # log 5 = 1.6 alone; (log 50 + log 5) / 2 = 2.8; log 50 = 3.9; a word of most texts weighs 0
    text = "Everywhere. A known one! Known and rare.\nrare: 12\n\n  "
    assert extract_summary(text, STATISTICS).splitlines() == [
        "rare: 12",
        "Known and rare.",
        "A known one!",
        "Everywhere.",
    ]


def test_equal_sentences_stay_in_the_order_of_the_text() -> None:
    assert extract_summary("x = 1\ny = 2\nz = 3", STATISTICS) == "x = 1\ny = 2\nz = 3"
    assert extract_summary(" \n", STATISTICS) == ""
