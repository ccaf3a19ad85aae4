"""Words of texts: how they are cut, counted and ranked."""

import math

import pytest
from tiny import WORD_STATISTICS, WORDY_TEXT

from nla_ray.text.words import WordStatistics, salient_words, split_words


def test_identifiers_are_cut_into_words_and_stop_words_left_out() -> None:
    assert split_words("readFrameIndex(df_test, x1) HTTPServer for the_self") == [
        "read",
        "frame",
        "index",
        "test",
        "http",
        "server",
    ]


def test_document_frequency_counts_a_word_once_a_text() -> None:
    statistics = WordStatistics.fit(["frame frame index", "frame dtype"])
    assert (statistics.num_documents, statistics.document_frequency) == (
        2,
        {"frame": 2, "index": 1, "dtype": 1},
    )


def test_salient_words_are_ranked_by_tf_idf() -> None:
    ranked = salient_words(WORDY_TEXT, WORD_STATISTICS, 4)
    assert [word for word, _ in ranked] == ["frame", "dtype", "columns", "index"]
    assert ranked[0][1] == pytest.approx((1 + math.log(3)) * math.log(1_000 / 20))
    assert ranked[1][1] == pytest.approx(math.log(50))


def test_words_that_are_too_rare_or_too_common_are_never_named() -> None:
    assert not {"rare", "common"} & {
        word for word, _ in salient_words(WORDY_TEXT, WORD_STATISTICS, 20)
    }


def test_a_plural_is_not_named_beside_its_singular() -> None:
    assert [word for word, _ in salient_words("columns column", WORD_STATISTICS, 5)] == ["column"]


def test_words_fall_into_bands_by_their_share_of_all_tellable_words() -> None:
    """Frequencies 20, 20, 40, 40, 50, 80, 125, 200: the middle of `columns` is at 100/575 = .17, of
    `index` at 145/575 = .25 (in no band), of `assert` at .37 (none), of `expected` at 312.5/575 =
    .54, of `result` at .83."""
    assert WORD_STATISTICS.band_of == {
        "dtype": 2,
        "frame": 2,
        "column": 2,
        "columns": 2,
        "expected": 1,
        "result": 0,
    }
