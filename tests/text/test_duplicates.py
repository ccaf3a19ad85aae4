"""Near duplicates: what signatures estimate, and which texts of a cluster are kept."""

import numpy as np
import pytest
from tiny import random_sentences

from nla_ray.text.duplicates import (
    first_of_clusters,
    has_twin,
    jaccard_similarity,
    minhash_signatures,
)


def exact_jaccard(left: str, right: str, size: int = 8) -> float:
    first, second = (
        {text[i : i + size] for i in range(len(text) - size + 1)} for text in (left, right)
    )
    return len(first & second) / len(first | second)


def test_signatures_estimate_the_jaccard_similarity_of_shingle_sets() -> None:
    base = random_sentences(1, 120)
    for keep in (0.95, 0.8, 0.5, 0.0):
        changed = (
            base[: int(len(base) * keep)] + random_sentences(2, 120)[: int(len(base) * (1 - keep))]
        )
        estimate = jaccard_similarity(*minhash_signatures([base, changed]))
        assert estimate == pytest.approx(exact_jaccard(base, changed), abs=0.12)


def test_case_white_space_and_the_values_of_digits_do_not_tell_texts_apart() -> None:
    texts = [
        "Version 1.2 of the  parser library",
        "version 9.7 of the\nparser library",
        "another text about the parser",
    ]
    assert first_of_clusters(minhash_signatures(texts), 0.7).tolist() == [True, False, True]


def test_twins_are_the_texts_that_nearly_repeat_one_of_others() -> None:
    text = (
        "def read(path):\n    with open(path) as file:\n        return [line.split(',') for line in"
        " file]\n" * 3
    )
    signatures = minhash_signatures(
        [text, "A licence that permits copying, with conditions, and nothing else at all."]
    )
    assert has_twin(
        signatures, minhash_signatures([text + "# end", "unrelated words"]), 0.7
    ).tolist() == [True, False]
    assert has_twin(signatures, minhash_signatures([]), 0.7).tolist() == [False, False]


def test_the_first_of_each_cluster_is_kept_and_chains_collapse() -> None:
    words = random_sentences(3, 60).split()
    chain = [" ".join(words[start : start + 50]) for start in (0, 3, 6)] + [random_sentences(4, 50)]
    assert first_of_clusters(minhash_signatures(chain), 0.7).tolist() == [True, False, False, True]


def test_duplicates_are_found_the_same_way_whatever_the_batch() -> None:
    texts = [random_sentences(seed, 40) for seed in range(50)]
    together = minhash_signatures(texts)
    assert np.array_equal(together, np.concatenate([minhash_signatures([text]) for text in texts]))


@pytest.mark.parametrize("texts", [[], ["only one"]])
def test_none_or_one_text_has_no_duplicate(texts: list[str]) -> None:
    assert first_of_clusters(minhash_signatures(texts), 0.7).tolist() == [True] * len(texts)
