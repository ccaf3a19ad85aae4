"""Patch-back's figures by hand: shares of mean divergences over patched rows alone."""

from __future__ import annotations

import pytest
import torch

from nla_ray.activation.patching import Patched
from nla_ray.report.recovered import PATCH_FIGURES, PatchBack
from nla_ray.score.bootstrap import FamilyBootstrap


def patched(divergence: list[float], keeps_top: list[bool]) -> dict[str, Patched]:
    return {
        "judge": Patched(divergence=torch.tensor(divergence), keeps_top=torch.tensor(keeps_top))
    }


PATCH_BACK = PatchBack(
    rows=[1, 2, 4],
    mean_divergence=torch.tensor([2.0, 4.0, 0.0]),
    by_verbalizer={
        "gold": patched([0.5, 1.0, 0.0], [True, True, True]),
        "shuffled": patched([3.0, 4.5, 0.3], [False, False, True]),
    },
)
"""Rows 1, 2 and 4 of five; the last row's next token does not depend on its activation."""


@pytest.mark.parametrize(
    ("verbalizer", "expected"),
    [
        ("gold", [1 - 1.5 / 6, 7.8 / 6 - 1.5 / 6, 0.5, 1.0]),
        ("shuffled", [1 - 7.8 / 6, 0.0, 2.6, 1 / 3]),
    ],
)
def test_each_figure_equals_the_number_worked_out_by_hand(
    verbalizer: str, expected: list[float]
) -> None:
    figures = PATCH_BACK.figures(verbalizer, "judge", num_rows=5)
    assert tuple(figures) == tuple(PATCH_FIGURES)
    assert [figure.value for figure in figures.values()] == pytest.approx(expected)


def test_rows_that_were_not_patched_count_in_no_interval() -> None:
    figures = PATCH_BACK.figures("gold", "judge", num_rows=5)
    intervals = FamilyBootstrap(["a", "b", "c", "d", "e"], 200, 0).intervals(figures)
    assert intervals["keeps_top"].n == 3 and intervals["keeps_top"].families == 3
    # the share of the row without any divergence is 0 / 0: it says nothing
    assert intervals["recovered"].n == 2
    assert intervals["recovered"].low == intervals["recovered"].high == pytest.approx(0.75)
