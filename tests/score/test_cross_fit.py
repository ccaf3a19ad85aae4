"""Probabilities of words, read by probes that never saw the text: their folds and calibration."""

from __future__ import annotations

import pytest
import torch

from nla_ray.score.cross_fit import FOLDS, CrossFitted, cross_fit
from nla_ray.score.linear import PENALTIES
from nla_ray.score.probe import ProbeSums, words_of

WORDS = [f"word{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(60)]
D_MODEL = 24


def rows_with_words(
    count: int, seed: int, noise: float = 0.3
) -> tuple[torch.Tensor, list[str], list[str]]:
    """Activations, sums of their words' directions and noise; texts; families of two rows."""
    directions = torch.randn(len(WORDS), D_MODEL, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(count, len(WORDS), generator=generator) < 0.05
    vectors = present.float() @ directions
    vectors += noise * torch.randn(count, D_MODEL, generator=generator) + 3.0
    texts = [
        " ".join(word for word, is_in in zip(WORDS, row, strict=True) if is_in) for row in present
    ]
    return vectors, texts, [f"family{row // 2}" for row in range(count)]


@pytest.fixture(scope="module")
def fitted() -> tuple[CrossFitted, torch.Tensor, list[str]]:
    vectors, texts, families = rows_with_words(1_200, seed=1)
    mean = torch.nn.functional.normalize(vectors, dim=1).mean(0)
    return cross_fit(vectors, texts, families, mean), vectors, texts


def probabilities(probes: CrossFitted, vectors: torch.Tensor, *, fitted: bool) -> torch.Tensor:
    blocks = list(probes.blocks(vectors, fitted=fitted))
    assert [row for rows, _ in blocks for row in rows] == list(range(len(vectors)))
    return torch.cat([block for _, block in blocks])


def presence(probes: CrossFitted, texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(word in text.split()) for word in probes.words] for text in texts])


def reliability_gap(probability: torch.Tensor, present: torch.Tensor) -> float:
    """Mean |probability - share present| over tenths of probability, weighted by their size."""
    tenth = (10 * probability).long().clamp(max=9)
    gaps = [
        (probability[tenth == part].mean() - present[tenth == part].mean()).abs()
        * (tenth == part).float().mean()
        for part in tenth.unique()
    ]
    return float(sum(gaps))


def test_a_family_is_in_one_fold_and_its_probe_is_fitted_without_it(fitted) -> None:
    probes, vectors, texts = fitted
    assert len(probes.folds) == FOLDS and set(probes.fold_of) == set(range(FOLDS))
    assert all(probes.fold_of[row] == probes.fold_of[row + 1] for row in range(0, len(texts), 2))
    others = [row for row in range(len(texts)) if probes.fold_of[row] != 0]
    held = [words_of(texts[row]) for row in others]
    sums = ProbeSums.of(vectors[others], held, probes.words, probes.whole.probe.mean)
    weights = [
        sums.solve(probes.words, probes.whole.probe.mean, penalty).weight for penalty in PENALTIES
    ]
    agree = [torch.allclose(weight, probes.folds[0].weight, atol=1e-4) for weight in weights]
    assert sum(agree) == 1
    assert not torch.allclose(probes.folds[1].weight, probes.folds[0].weight, atol=1e-2)


def test_probabilities_are_calibrated_on_the_rows_themselves_and_on_others(fitted) -> None:
    probes, vectors, texts = fitted
    own = probabilities(probes, vectors, fitted=True)
    assert reliability_gap(own, presence(probes, texts)) < 0.02
    fresh, fresh_texts, _ = rows_with_words(600, seed=2)
    others = probabilities(probes, fresh, fitted=False)
    present = presence(probes, fresh_texts)
    assert reliability_gap(others, present) < 0.02
    assert others[present == 1].mean() > 0.4 > 0.1 > others[present == 0].mean()


def test_activations_that_hold_nothing_give_every_word_its_share() -> None:
    vectors, texts, families = rows_with_words(800, seed=3)
    nothing = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(4)) + 3.0
    probes = cross_fit(nothing, texts, families, torch.full((D_MODEL,), 0.2))
    read = probabilities(probes, nothing, fitted=True)
    assert read.max() < 0.3
    assert read.mean().item() == pytest.approx(presence(probes, texts).mean().item(), abs=0.01)


@pytest.mark.parametrize("rows", [10, 20, 40, 100])
@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_probabilities_rise_with_the_score_however_few_rows_there_are(
    rows: int, noise: float
) -> None:
    probes = cross_fit(*rows_with_words(rows, seed=7, noise=noise), torch.full((D_MODEL,), 0.2))
    scores = torch.linspace(-4.0, 9.0, 60)[:, None].expand(60, len(probes.words))
    read = probes.whole.calibrated(scores)
    assert read.isfinite().all() and (read.diff(dim=0) >= -1e-6).all()


def test_fewer_families_than_folds_are_refused() -> None:
    vectors, texts, families = rows_with_words(8, seed=5)
    with pytest.raises(ValueError, match="train families of a cross-fitted probe: got 4, expected"):
        cross_fit(vectors, texts, families, torch.zeros(D_MODEL))


def test_texts_without_a_word_of_the_probe_are_read_all_the_same() -> None:
    vectors, _, families = rows_with_words(10, seed=6)
    probes = cross_fit(vectors, ["12"] * 10, families, torch.zeros(D_MODEL))
    assert probes.words == []
    assert probabilities(probes, vectors, fitted=True).shape == (10, 0)
    everywhere = cross_fit(vectors, ["import"] * 10, families, torch.zeros(D_MODEL))
    assert probabilities(everywhere, vectors, fitted=True).min() > 0.9
