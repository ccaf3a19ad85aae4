"""The linear probe of words: it equals the formula, and names the words that activations carry."""

from __future__ import annotations

import numpy as np
import torch

from nla_ray.score import claims
from nla_ray.score.probe import fit_classes, fit_probe, words_as_bullets

WORDS = [
    f"{first}{second}" for first in ("bar", "lam", "tor", "fen") for second in ("an", "el", "im")
]
D_MODEL = 16


def world(rows: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Activations that are sums of their texts' word vectors around a common mean."""
    meaning = torch.randn(len(WORDS), D_MODEL, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    texts, activations = [], []
    for _ in range(rows):
        numbers = torch.randperm(len(WORDS), generator=generator)[:2]
        texts.append(f"the {' '.join(WORDS[number] for number in numbers.tolist())} 12 ab")
        noise = 0.1 * torch.randn(D_MODEL, generator=generator)
        activations.append(5.0 + meaning[numbers].sum(0) + noise)
    return torch.stack(activations), texts


def mean_direction(activations: torch.Tensor) -> torch.Tensor:
    return (activations / activations.norm(dim=1, keepdim=True)).mean(0)


def test_the_weights_are_those_of_ridge_regression_over_the_deviation_of_each_word() -> None:
    train, texts = world(200, seed=2)
    mean = mean_direction(train)
    probe = fit_probe(train, texts, train[:50], texts[:50], mean)
    x = (train / train.norm(dim=1, keepdim=True) - mean).double().numpy()
    y = np.array([[word in text.split() for word in WORDS] for text in texts], dtype=float)
    centred, presence = x - x.mean(0), y - y.mean(0)
    found = {
        penalty: np.linalg.lstsq(
            np.vstack([centred, np.sqrt(penalty * (centred**2).sum(0).mean()) * np.eye(D_MODEL)]),
            np.vstack([presence, np.zeros((D_MODEL, len(WORDS)))]),
            rcond=None,
        )[0].T
        / y.std(0)[:, None]
        for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    }
    order = [WORDS.index(word) for word in probe.words]
    assert sorted(order) == list(range(len(WORDS)))  # "the", "ab" and 12 are no claims
    assert any(
        np.allclose(probe.weight.numpy(), weight[order], rtol=1e-3, atol=1e-4)
        for weight in found.values()
    )


def test_the_probe_names_the_words_of_texts_it_has_not_seen() -> None:
    train, texts = world(400, seed=3)
    unseen, unseen_texts = world(60, seed=4)
    probe = fit_probe(train, texts, train[:50], texts[:50], mean_direction(train))
    ranked = probe.rank(unseen, 2)
    right = [
        set(words) <= set(text.split()) for words, text in zip(ranked, unseen_texts, strict=True)
    ]
    assert sum(right) > 0.9 * len(right)
    assert [len(words) for words in probe.rank(unseen[:2], 100)] == [len(WORDS)] * 2


def test_words_of_too_few_or_too_many_texts_are_no_words_of_the_probe() -> None:
    generator = torch.Generator().manual_seed(0)
    # of 1,000 texts: 1, 2, 250 and 251 times
    texts = [
        f"{'one ' * (row < 1)}{'pair ' * (row < 2)}"
        f"{'quarter ' * (row < 250)}{'beyond ' * (row < 251)}"
        for row in range(1_000)
    ]
    train = torch.randn(1_000, 4, generator=generator)
    probe = fit_probe(train, texts, train[:9], texts[:9], torch.zeros(4))
    assert probe.words == ["pair", "quarter"]
    empty = fit_probe(train, [""] * 1_000, train[:9], [""] * 9, torch.zeros(4))
    assert empty.rank(train[:2], 3) == [[], []]


def test_every_word_of_the_probe_is_one_claim_of_its_bullets() -> None:
    train, texts = world(200, seed=2)
    probe = fit_probe(train, texts, train[:9], texts[:9], mean_direction(train))
    [words] = probe.rank(train[:1], 5)
    assert claims.claimed_words(words_as_bullets(words)) == frozenset(words)
    assert words_as_bullets([]) == ""


def test_a_class_is_read_where_an_activation_tells_of_it_and_a_rare_one_never() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(8)[:3]
    kinds = [number % 3 for number in range(1_500)]
    rows = directions[kinds] + 0.1 * torch.randn(1_500, 8, generator=generator)
    names = ["test", "licence", ""]
    classes = [names[kind] for kind in kinds]
    classes[0] = "only once"
    mean = torch.zeros(8)
    probe = fit_classes(rows[:1_200], classes[:1_200], rows[1_200:], classes[1_200:], mean)
    assert probe.probe.words == ["", "licence", "test"]
    read = probe.most_likely(rows[1_200:])
    assert read == classes[1_200:]
    nothing = fit_classes(rows[:9], [""] * 9, rows[:9], [""] * 9, mean)
    assert nothing.most_likely(rows[:2]) == ["", ""]
