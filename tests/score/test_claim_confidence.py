"""Evidence for claims, and the regression that makes a probability of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nla_ray.score.claim_confidence import (
    Claim,
    ClaimConfidence,
    claim_log_probs,
    claims_of,
    gather_claims,
)
from nla_ray.score.cross_fit import CalibratedProbe
from nla_ray.score.logistic import fit_constant, fit_logistic
from nla_ray.score.probe import WordProbe

PROBE = CalibratedProbe(
    probe=WordProbe(
        words=["frame", "index"],
        weight=torch.tensor([[2.0, 0.0], [0.0, 2.0]]),
        feature_mean=torch.zeros(2),
        mean=torch.zeros(2),
    ),
    log_odds=torch.zeros(2),
    coefficients=torch.tensor([0.0, 1.0, 0.0, 0.0]),
)


def test_a_claims_log_probability_is_that_of_all_its_tokens_where_it_is_said_first() -> None:
    pieces = ["-", " tokens", ":", " ind", "ex", ",", " dtype", ",", " index"]
    log_probs = [-9.0, -9.0, -9.0, -1.0, -0.5, -9.0, -0.25, -9.0, -2.0]
    numbers = list(range(len(pieces)))
    said = claim_log_probs(numbers, log_probs, lambda ids: "".join(pieces[n] for n in ids))
    assert said == {"index": -1.5, "dtype": -0.25}


def test_what_speaks_for_a_claim() -> None:
    description = '- tokens: frame, "index frame", qux'
    samples = ["- tokens: frame", "- tokens: frame, qux"]
    log_probs = {"frame": -0.1, "index frame": -0.2, "qux": -0.3}
    said = claims_of(description, log_probs, samples, {"frame": 0.9, "index": 0.2})
    assert said == [
        Claim(word="frame", log_prob=-0.1, agreement=1.0, probability=0.9),
        Claim(word="index frame", log_prob=-0.2, agreement=0.0, probability=0.2),
        Claim(word="qux", log_prob=-0.3, agreement=0.5, probability=None),
    ]


def test_each_row_is_asked_of_its_own_activation() -> None:
    rows = gather_claims(
        PROBE,
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        ["- tokens: frame, index"] * 2,
        [{"frame": -0.1, "index": -0.2}] * 2,
        [["- tokens: frame"], ["- next: nothing"]],
    )
    likely, unlikely = torch.sigmoid(torch.tensor([2.0, 0.0])).tolist()
    probabilities = [[claim.probability for claim in row] for row in rows]
    assert probabilities[0] == pytest.approx([likely, unlikely])
    assert probabilities[1] == pytest.approx([unlikely, likely])
    assert [[claim.agreement for claim in row] for row in rows] == [[1.0, 0.0], [0.0, 0.0]]


def drawn_claims(count: int, seed: int) -> tuple[list[Claim], list[bool]]:
    """Claims that are found as often as a regression of known weights says."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(count, generator=generator)
    agreement = torch.randint(0, 5, (count,), generator=generator) / 4
    probability = torch.rand(count, generator=generator).clamp(0.02, 0.98)
    is_known = torch.rand(count, generator=generator) < 0.8
    known = torch.where(is_known, torch.logit(probability), 0.0)
    score = 0.3 + 0.5 * log_probs + 1.5 * agreement + 0.8 * known - 0.7 * ~is_known
    found = torch.rand(count, generator=generator) < torch.sigmoid(score)
    said = [
        Claim(
            word="x",
            log_prob=log_probs[row].item(),
            agreement=agreement[row].item(),
            probability=probability[row].item() if is_known[row] else None,
        )
        for row in range(count)
    ]
    return said, found.tolist()


def test_the_weights_that_made_the_outcomes_are_found_again_and_hold_elsewhere(
    tmp_path: Path,
) -> None:
    fitted = ClaimConfidence.fit(PROBE, *drawn_claims(20_000, 0))
    assert fitted.weights.tolist() == pytest.approx([0.3, 0.5, 1.5, 0.8, -0.7], abs=0.15)
    said, found = drawn_claims(4_000, 1)
    probabilities, outcomes = fitted.probabilities(said), torch.tensor(found).float()
    for low in (0.2, 0.5, 0.8):
        inside = (probabilities >= low) & (probabilities < low + 0.2)
        said_to_be, is_so = probabilities[inside].mean().item(), outcomes[inside].mean().item()
        assert is_so == pytest.approx(said_to_be, abs=0.05)
    fitted.save(tmp_path)
    loaded = ClaimConfidence.load(tmp_path)
    assert torch.equal(loaded.probabilities(said), probabilities)
    activations = torch.randn(3, 2)
    assert torch.equal(loaded.probe.probabilities(activations), PROBE.probabilities(activations))
    assert loaded.probe.probe.words == ["frame", "index"]


def test_a_logistic_fit_leaves_no_slope_and_a_constant_fit_the_mean() -> None:
    x = torch.cat([torch.ones(200, 1), torch.randn(200, 2)], dim=1)
    y = (torch.rand(200) < 0.3).float()
    weights = fit_logistic(x, y)
    residual = y.double() - torch.sigmoid(x.double() @ weights)
    assert (x.double().T @ residual).abs().max() < 0.01  # the damping is all that is left
    shifted = fit_constant(x, y, weights + torch.tensor([1.0, 0.5, 0.0]))
    assert torch.sigmoid(x.double() @ shifted).mean() == pytest.approx(y.mean().item(), abs=1e-6)
    assert torch.equal(shifted[1:], (weights + torch.tensor([1.0, 0.5, 0.0]))[1:])


def test_without_a_claim_to_learn_from_nobody_is_believed_more_than_another() -> None:
    fitted = ClaimConfidence.fit(PROBE, [], [])
    assert fitted.probabilities(drawn_claims(3, 0)[0]).tolist() == [0.5] * 3
    assert fitted.probabilities([]).shape == (0,)


def test_outcomes_that_can_be_told_apart_without_error_have_finite_weights() -> None:
    x = torch.tensor([[1.0, -1.0], [1.0, -2.0], [1.0, 1.0], [1.0, 2.0]])
    weights = fit_logistic(x, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert weights.isfinite().all() and weights[1] > 2.0
