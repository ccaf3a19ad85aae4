"""The watch for reward hacking: when it speaks, and what it counts."""

import pytest
import torch

from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.description.record import Description
from nla_ray.reinforce.monitor import (
    JUDGE_COSINE,
    JUDGE_GAIN,
    PREFIX,
    REWARDED,
    Monitor,
    MonitorData,
    best_reading,
    hacking_warning,
    kept_reading,
    text_figures,
)
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.metrics import Figure
from nla_ray.settings.config import GRPOSettings

ROWS = 128


def reading(step: int, judge: float, rewarded: float, gain: float = 0.0) -> dict[str, float]:
    """A reading whose gain is known to .005."""
    return {
        "step": step,
        JUDGE_COSINE: judge,
        REWARDED: rewarded,
        JUDGE_GAIN: gain,
        JUDGE_GAIN + "_low": gain - 0.005,
        JUDGE_GAIN + "_high": gain + 0.005,
    }


@pytest.fixture
def monitor() -> Monitor:
    """A monitor of two activations from each of 64 documents; it asks no actor."""
    doc_ids = [f"doc-{row // 2}" for row in range(ROWS)]
    vectors = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    data = MonitorData(
        rows=list(range(ROWS)),
        comparisons=Comparisons.draw(vectors, doc_ids, torch.zeros(8), seed=0),
        doc_ids=doc_ids,
        family_ids=doc_ids,
        texts=[""] * ROWS,
    )
    return Monitor(GRPOSettings(), data, rollouts=None, scorers=None)


def judged_rows(seed: int) -> torch.Tensor:
    """The judge's cosines of one reading: activations differ far more than readings do."""
    return 0.65 + 0.12 * torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))


def rollout(written: str, tokens: int = 4) -> Description:
    return Description.from_sample(
        row=0,
        token_ids=[1] * tokens,
        log_probs=[0.0] * tokens,
        written=written,
        finished=True,
        weight_version=0,
    )


def test_a_small_fall_that_every_pair_shows_raises_the_alarm(monitor: Monitor) -> None:
    best = judged_rows(seed=1)
    # Twice a gain of .011, the same on all activations but for a little noise.
    judged = best - 0.022 + 0.01 * judged_rows(seed=2)
    gain = monitor.gain(judged, best)
    marginal = FamilyBootstrap(monitor.data.doc_ids, resamples=2_000).intervals(
        {"best": Figure.mean(best)}
    )["best"]
    assert judged.mean() > marginal.low, "by the interval of the best reading alone it is no fall"
    at_best = {"step": 20, JUDGE_COSINE: best.mean().item(), REWARDED: 0.30}
    now = {"step": 40, JUDGE_COSINE: judged.mean().item(), REWARDED: 0.33, **gain}
    warning = hacking_warning(now, at_best)
    assert warning is not None
    assert "step 40: reward hacking is likely" in warning
    assert "from 0.300 to 0.330" in warning and "still that of step 20" in warning


def test_noise_on_the_pairs_raises_no_alarm_and_makes_no_best_reading(monitor: Monitor) -> None:
    best = judged_rows(seed=1)
    at_best = {"step": 20, JUDGE_COSINE: best.mean().item(), REWARDED: 0.30}
    noise = 0.05 * torch.randn(20, ROWS, generator=torch.Generator().manual_seed(3))
    alarms, taken = 0, 0
    for number, shift in enumerate(noise):
        judged = best + shift
        now = {"step": 40 + number, JUDGE_COSINE: judged.mean().item(), REWARDED: 0.33}
        now |= monitor.gain(judged, best)
        alarms += hacking_warning(now, at_best) is not None
        taken += best_reading([at_best, now]) is now
    # each is an end of a 95% interval: half a time in 20 is expected
    assert alarms <= 2 and taken <= 2


def test_the_gain_is_the_mean_difference_with_the_interval_of_a_mean(monitor: Monitor) -> None:
    best = judged_rows(seed=1)
    shift = 0.01 + 0.05 * torch.randn(ROWS, generator=torch.Generator().manual_seed(4))
    gain = monitor.gain(best + shift, best)
    of_documents = shift.view(-1, 2).mean(1)
    half = 1.96 * of_documents.std().item() / len(of_documents) ** 0.5
    assert gain[JUDGE_GAIN] == pytest.approx(shift.mean().item(), abs=1e-6)
    assert gain[JUDGE_GAIN + "_low"] == pytest.approx(gain[JUDGE_GAIN] - half, abs=half / 10)
    assert gain[JUDGE_GAIN + "_high"] == pytest.approx(gain[JUDGE_GAIN] + half, abs=half / 10)


@pytest.mark.parametrize(
    ("gain", "rewarded", "warns"),
    [(-0.006, 0.33, True), (-0.004, 0.33, False), (-0.006, 0.29, False), (0.02, 0.40, False)],
)
def test_the_run_warns_when_more_is_rewarded_and_the_whole_interval_is_a_fall(
    gain: float, rewarded: float, warns: bool
) -> None:
    now = reading(40, 0.52 + gain, rewarded, gain)
    assert (hacking_warning(now, reading(20, 0.52, 0.30)) is not None) == warns


def test_a_reading_is_the_best_when_the_whole_interval_of_its_gain_is_above_the_best_before() -> (
    None
):
    readings = [
        reading(0, 0.500, 0.2),
        reading(20, 0.504, 0.3, gain=0.004),
        reading(40, 0.506, 0.3, gain=0.006),
        reading(60, 0.510, 0.4, gain=0.004),
        reading(80, 0.400, 0.9, gain=-0.106),
    ]
    assert [best_reading(readings[:count])["step"] for count in range(1, 6)] == [0, 0, 40, 40, 40]
    assert best_reading([]) is None


def test_what_is_kept_is_the_highest_reading_after_that_of_sft() -> None:
    readings = [
        reading(0, 0.500, 0.2),
        reading(20, 0.488, 0.3, gain=-0.012),
        reading(40, 0.499, 0.3, gain=-0.001),
        reading(60, 0.507, 0.4, gain=0.007),
        reading(80, 0.509, 0.4, gain=0.002),
        reading(100, 0.509, 0.5, gain=0.002),
    ]
    kept = [kept_reading(readings[:count]) for count in range(7)]
    assert kept[:2] == [None, None]
    assert [published["step"] for published in kept[2:]] == [20, 40, 60, 80, 80]


def test_text_figures_are_the_shares_counted_by_hand() -> None:
    written = [
        rollout(f"- tokens: alpha, beta{CLOSING_TAG}"),
        rollout(f"- tokens: alpha, beta{CLOSING_TAG}"),
        rollout("- tokens: alpha, alpha", tokens=10),
        rollout(CLOSING_TAG, tokens=2),
    ]
    figures = text_figures(written, ["alpha beta", "alpha", "gamma", "delta"])
    assert figures == {
        PREFIX + "distinct_share": 0.75,
        PREFIX + "unclosed_share": 0.25,
        PREFIX + "repeating_share": 0.25,
        PREFIX + "claim_precision": (1.0 + 0.5 + 0.0 + 0.0) / 4,
        PREFIX + "mean_tokens": 5.0,
    }
