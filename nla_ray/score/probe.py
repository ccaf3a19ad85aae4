"""A linear probe of words: what a ridge regression reads in an activation, without a verbalizer.

It is the control of what descriptions claim: whoever names fewer true words than the probe has not
read what is there. x = c(v), y = whether a word occurs in the text; a word's score is its predicted
presence less its share of texts, divided by the standard deviation of y. Pure: it is given
activations and texts, and knows no run. Source: Hoerl & Kennard, "Ridge Regression", 1970.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
_LEAST_ROWS = 5
"""Of a class that a probe chooses among."""
BLOCK_ROWS = 256
"""Rows that are looked at in one go."""
_NO_DEVIATION = 1e-9


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
        for block in activations.split(BLOCK_ROWS):
            best = self.scores(block).topk(min(most, len(self.words)), dim=1).indices
            ranked += [[self.words[word] for word in row] for row in best.tolist()]
        return ranked

    def scores(self, activations: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows words"]:
        """Predicted presence of every word less its share, in standard deviations."""
        return (vectors.centre(activations, self.mean) - self.feature_mean) @ self.weight.T


@dataclass(frozen=True, kw_only=True)
class ProbeSums:
    """Sums over rows that a probe is solved from; sums of parts add up to those of the whole.

    Example, of one row: rows=1, features=<[d_model]>, gram=<[d_model, d_model]>,
    counts=<[words]>, cross=<[words, d_model]>, all float64.
    """

    rows: int
    features: Float[Tensor, " d_model"]
    """Sum of x = c(v)."""
    gram: Float[Tensor, "d_model d_model"]
    """Sum of x x'."""
    counts: Float[Tensor, " words"]
    """In how many rows each word is."""
    cross: Float[Tensor, "words d_model"]
    """Sum of x over the rows with each word."""

    @classmethod
    def of(
        cls,
        activations: Float[Tensor, "rows d_model"],
        held: Sequence[frozenset[str]],
        words: Sequence[str],
        mean: Float[Tensor, " d_model"],
    ) -> ProbeSums:
        """`held`: the words of each row's text. `mean`: mu."""
        number_of = {word: number for number, word in enumerate(words)}
        size = activations.shape[1]
        features = torch.zeros(size, dtype=torch.float64)
        gram = torch.zeros(size, size, dtype=torch.float64)
        counts = torch.zeros(len(words), dtype=torch.float64)
        cross = torch.zeros(len(words), size, dtype=torch.float64)
        for start in range(0, len(held), BLOCK_ROWS):
            block = vectors.centre(activations[start : start + BLOCK_ROWS], mean).double()
            pairs = [
                (row, number_of[word])
                for row, present in enumerate(held[start : start + BLOCK_ROWS])
                for word in present
                if word in number_of
            ]
            rows, numbers = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
            features += block.sum(0)
            gram += block.T @ block
            counts += numbers.bincount(minlength=len(words))
            cross.index_add_(0, numbers, block[rows])
        return cls(rows=len(held), features=features, gram=gram, counts=counts, cross=cross)

    def __add__(self, other: ProbeSums) -> ProbeSums:
        """The sums over the rows of both."""
        return self._by_field(other, operator.add)

    def __sub__(self, part: ProbeSums) -> ProbeSums:
        """The sums over the rows that are not in `part`."""
        return self._by_field(part, operator.sub)

    def _by_field(self, other: ProbeSums, combine: Callable[[Any, Any], Any]) -> ProbeSums:
        names = [field.name for field in dataclasses.fields(self)]
        return ProbeSums(
            **{name: combine(getattr(self, name), getattr(other, name)) for name in names}
        )

    @property
    def shares(self) -> Float[Tensor, " words"]:
        """Of the rows, those with each word."""
        return self.counts / max(1, self.rows)

    def solve(self, words: list[str], mean: Float[Tensor, " d_model"], penalty: float) -> WordProbe:
        """The probe of these rows. A word that all or none of them have scores 0."""
        feature_mean = self.features / max(1, self.rows)
        gram = self.gram - self.rows * torch.outer(feature_mean, feature_mean)
        cross = self.cross - torch.outer(self.counts, feature_mean)
        deviation = (self.shares * (1 - self.shares)).sqrt()
        weight = solve_ridge(gram, cross.T, penalty) / deviation.clamp_min(_NO_DEVIATION)[:, None]
        weight[deviation < _NO_DEVIATION] = 0.0
        return WordProbe(
            words=words, weight=weight.float(), feature_mean=feature_mean.float(), mean=mean
        )


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
    held = [words_of(text) for text in train_texts]
    words = probed_words(held)
    sums = ProbeSums.of(train, held, words, mean)
    validation_words = [words_of(text) for text in validation_texts]
    penalty = best_penalty(sums, words, mean, validation, validation_words)
    return sums.solve(words, mean, penalty)


def best_penalty(
    sums: ProbeSums,
    words: list[str],
    mean: Float[Tensor, " d_model"],
    held_out: Float[Tensor, "rows d_model"],
    held: Sequence[frozenset[str]],
) -> float:
    """The penalty whose probe names most true words of rows that it was not fitted to.

    `held`: the words of their texts.
    """
    return max(
        PENALTIES, key=lambda penalty: _true_words(sums.solve(words, mean, penalty), held_out, held)
    )


@dataclass(frozen=True, kw_only=True)
class ClassProbe:
    """A linear map from activations to one of several classes: that with the highest presence.

    Example: probe=<its words are the classes ["", "licence"]>, shares=tensor([0.7, 0.3])
    """

    probe: WordProbe
    shares: Float[Tensor, " classes"]
    """Of the rows, those of each class."""

    def most_likely(self, activations: Float[Tensor, "rows d_model"]) -> list[str]:
        """The class of each row."""
        if not self.probe.words:
            return [""] * len(activations)
        deviation = (self.shares * (1 - self.shares)).sqrt()
        presence = self.probe.scores(activations) * deviation + self.shares
        return [self.probe.words[number] for number in presence.argmax(1).tolist()]


def fit_classes(
    train: Float[Tensor, "train d_model"],
    train_classes: Sequence[str],
    validation: Float[Tensor, "validation d_model"],
    validation_classes: Sequence[str],
    mean: Float[Tensor, " d_model"],
) -> ClassProbe:
    """The probe of the train rows, with the penalty that is right most often on validation.

    `train_classes`: of each row, "" among them. One of fewer than _LEAST_ROWS rows, or than the
    least of PROBED_SHARES, is left out.
    """
    least = max(_LEAST_ROWS / max(1, len(train_classes)), PROBED_SHARES[0])
    held = [frozenset({name}) for name in train_classes]
    names = probed_words(held, (least, 1.0))
    sums = ProbeSums.of(train, held, names, mean)
    probes = [
        ClassProbe(probe=sums.solve(names, mean, penalty), shares=sums.shares.float())
        for penalty in PENALTIES
    ]

    def right(probe: ClassProbe) -> int:
        pairs = zip(probe.most_likely(validation), validation_classes, strict=True)
        return sum(found == wanted for found, wanted in pairs)

    return max(probes, key=right)


def words_of(text: str) -> frozenset[str]:
    """The words of a text that a list in a description can claim."""
    return frozenset(claims.content_words(text, listed=True))


def probed_words(
    held: Sequence[frozenset[str]], shares: tuple[float, float] = PROBED_SHARES
) -> list[str]:
    """The words of a probe: those that such a share of these texts has, sorted."""
    counts = Counter(word for words in held for word in words)
    least, largest = (share * len(held) for share in shares)
    return sorted(word for word, count in counts.items() if least <= count <= largest)


def _true_words(probe: WordProbe, activations: Tensor, held: Sequence[frozenset[str]]) -> int:
    """How many of the best words of all rows are in their texts."""
    ranked = probe.rank(activations, _CHOICE_WORDS)
    return sum(len(words & set(best)) for words, best in zip(held, ranked, strict=True))


def share_in_text(words: Sequence[str], text: str) -> float:
    """Share of words that a text has, by the rule for claims of a description; of none it is 0.

    >>> share_in_text(["frame", "index"], "the frame")
    0.5
    """
    return claims.claim_precision(words_as_bullets(words), text)


def words_as_bullets(words: Sequence[str]) -> str:
    """Words as a description claims them; no word is the empty description.

    >>> words_as_bullets(["frame", "index"])
    '- tokens: frame, index'
    """
    return f"- {claims.TOKENS_HEADING}: {', '.join(words)}" if words else ""
