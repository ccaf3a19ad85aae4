"""A linear probe of words: what a ridge regression reads in an activation, without a verbalizer.

It is the control of what descriptions claim: whoever names fewer true words than the probe has not
read what is there. x = c(v), y = whether a word occurs in the text; a word's score is its predicted
presence less its share of texts, divided by the standard deviation of y. Pure: it is given
activations and texts, and knows no run. Source: Hoerl & Kennard, "Ridge Regression", 1970.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.score import claims
from nla_ray.score.linear import PENALTIES, solve_ridge

PROBED_SHARES = (0.002, 0.25)
"""Least and largest share of the train texts that have a word of the probe."""
_CHOICE_WORDS = 5
"""The penalty is chosen by how many of this many words are true on validation texts."""
_BLOCK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class WordProbe:
    """Words, and a linear map from centred activations to their scores.

    Example: words=["frame", "licence"], weight=<[2, d_model]>, mean=<[d_model]>
    """

    words: list[str]
    weight: Float[Tensor, "words d_model"]
    """W, each row divided by the standard deviation of its word's presence."""
    feature_mean: Float[Tensor, " d_model"]
    """Mean of c(v) over the rows it was fitted to."""
    mean: Float[Tensor, " d_model"]
    """mu."""

    def rank(self, activations: Float[Tensor, "rows d_model"], most: int) -> list[list[str]]:
        """The words with the highest scores of each row, best first: `most`, or all there are."""
        ranked: list[list[str]] = []
        for block in activations.split(_BLOCK_ROWS):
            deviation = vectors.centre(block, self.mean) - self.feature_mean
            scores = deviation @ self.weight.T
            best = scores.topk(min(most, len(self.words)), dim=1).indices
            ranked += [[self.words[word] for word in row] for row in best.tolist()]
        return ranked


def fit_probe(
    train: Float[Tensor, "train d_model"],
    train_texts: Sequence[str],
    validation: Float[Tensor, "validation d_model"],
    validation_texts: Sequence[str],
    mean: Float[Tensor, " d_model"],
) -> WordProbe:
    """The probe of the train rows, with the penalty that names most true words on validation.

    Its words are those that a description can claim and that a share of PROBED_SHARES of the train
    texts has; there may be none.
    """
    held = [_words_of(text) for text in train_texts]
    words = _probed_words(held)
    features = vectors.centre(train, mean)
    feature_mean = features.mean(0)
    centred = (features - feature_mean).double()
    counts, cross = _cross_products(centred, held, words)
    share = counts / max(1, len(held))
    # A word of all texts or of none has no deviation; PROBED_SHARES leaves none in.
    deviation = (share * (1 - share)).sqrt()
    gram = centred.T @ centred
    probes = []
    for penalty in PENALTIES:
        weight = solve_ridge(gram, cross, penalty) / deviation[:, None]
        probes.append(
            WordProbe(words=words, weight=weight.float(), feature_mean=feature_mean, mean=mean)
        )
    held_out = [_words_of(text) for text in validation_texts]
    return max(probes, key=lambda probe: _true_words(probe, validation, held_out))


def _words_of(text: str) -> frozenset[str]:
    """The words of a text that a list in a description can claim."""
    return frozenset(claims.content_words(text, listed=True))


def _probed_words(held: Sequence[frozenset[str]]) -> list[str]:
    counts = Counter(word for words in held for word in words)
    least, largest = (share * len(held) for share in PROBED_SHARES)
    return sorted(word for word, count in counts.items() if least <= count <= largest)


def _cross_products(
    centred: Float[Tensor, "rows d_model"], held: Sequence[frozenset[str]], words: Sequence[str]
) -> tuple[Float[Tensor, " words"], Float[Tensor, "d_model words"]]:
    """In how many rows each word is, and the sum of their features: centred' presence."""
    number_of = {word: number for number, word in enumerate(words)}
    counts = torch.zeros(len(words), dtype=torch.float64)
    sums = torch.zeros(len(words), centred.shape[1], dtype=torch.float64)
    for start in range(0, len(held), _BLOCK_ROWS):
        pairs = [
            (row, number_of[word])
            for row, present in enumerate(held[start : start + _BLOCK_ROWS], start)
            for word in present
            if word in number_of
        ]
        rows, numbers = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        counts += numbers.bincount(minlength=len(words))
        sums.index_add_(0, numbers, centred[rows])
    return counts, sums.T


def _true_words(probe: WordProbe, activations: Tensor, held: Sequence[frozenset[str]]) -> int:
    """How many of the best words of all rows are in their texts."""
    ranked = probe.rank(activations, _CHOICE_WORDS)
    return sum(len(words & set(best)) for words, best in zip(held, ranked, strict=True))


def words_as_bullets(words: Sequence[str]) -> str:
    """Words as a description claims them; no word is the empty description.

    >>> words_as_bullets(["frame", "index"])
    '- tokens: frame, index'
    """
    return f"- {claims.TOKENS_HEADING}: {', '.join(words)}" if words else ""
