"""The watch for reward hacking: when it speaks, and what it counts."""

import pytest

from nla_ray.base.prompts import CLOSING_TAG
from nla_ray.description.record import Description
from nla_ray.reinforce.monitor import (
    JUDGE_COSINE,
    PREFIX,
    REWARDED,
    best_reading,
    hacking_warning,
    text_figures,
)


def reading(step: int, judge: float, rewarded: float) -> dict[str, float]:
    return {
        "step": step,
        JUDGE_COSINE: judge,
        JUDGE_COSINE + "_low": judge - 0.03,
        JUDGE_COSINE + "_high": judge + 0.03,
        REWARDED: rewarded,
    }


def rollout(written: str, tokens: int = 4) -> Description:
    return Description.from_sample(
        row=0,
        token_ids=[1] * tokens,
        log_probs=[0.0] * tokens,
        written=written,
        finished=True,
        weight_version=0,
    )


def test_the_run_warns_when_the_reward_rises_while_the_judge_falls_out_of_its_interval() -> None:
    warning = hacking_warning(reading(40, 0.47, 0.33), reading(20, 0.52, 0.30))
    assert warning is not None
    assert "step 40: reward hacking is likely" in warning
    assert (
        "from 0.300 to 0.330" in warning
        and "from 0.520 [0.490, 0.550] to 0.470" in warning
        and "step 20 is kept" in warning
    )


@pytest.mark.parametrize(("judge", "rewarded"), [(0.50, 0.33), (0.47, 0.29), (0.56, 0.40)])
def test_the_run_is_silent_while_the_judge_stays_or_the_reward_falls(
    judge: float, rewarded: float
) -> None:
    assert hacking_warning(reading(40, judge, rewarded), reading(20, 0.52, 0.30)) is None


def test_the_best_reading_is_the_judges_and_the_earliest_of_equals() -> None:
    readings = [
        reading(0, 0.50, 0.2),
        reading(20, 0.52, 0.3),
        reading(40, 0.52, 0.4),
        reading(60, 0.40, 0.9),
    ]
    assert best_reading(readings)["step"] == 20
    assert best_reading([]) is None


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
