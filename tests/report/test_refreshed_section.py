"""Two verbalizers by two scorers: what a scorer that knows the verbalizer's style makes of them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from tiny_artifacts import publish_scorer

from nla_ray.description.record import Description
from nla_ray.report.evaluated import Evaluated
from nla_ray.report.readings import Readings
from nla_ray.report.refreshed import two_by_two
from nla_ray.report.rendering.refreshed import refreshed_section
from nla_ray.report.stage import make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import Comparisons
from nla_ray.settings.config import RunConfig

ROWS = 12
DOC_IDS = [f"doc{row}" for row in range(ROWS)]


def evaluated(refreshed_noise: dict[str, float] | None) -> Evaluated:
    """The reward scorer reads grpo better than sft; the refreshed one as its noise says."""
    originals = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))
    descriptions = {
        name: [Description.from_text(f"{name} {row}", num_tokens=2) for row in range(ROWS)]
        for name in ("gold", "sft", "grpo", "generic")
    }

    def readings(scorer: str, scale: dict[str, float]) -> Readings:
        texts = [said.text for name in scale for said in descriptions[name]]
        read = [originals + of_name * noise for of_name in scale.values()]
        return Readings(texts, {scorer: torch.cat(read)})

    paid = readings("reward", {"gold": 0.2, "sft": 1.0, "grpo": 0.5, "generic": 2.0})
    return Evaluated(
        doc_ids=DOC_IDS,
        family_ids=DOC_IDS,
        domains=["licence"] * ROWS,
        texts=DOC_IDS,
        salient=[[]] * ROWS,
        comparisons=Comparisons.draw(originals, DOC_IDS, torch.zeros(8), 0, ["licence"] * ROWS),
        descriptions=descriptions,
        prefixes={},
        sampled="grpo",
        readings=paid,
        refreshed=readings("refreshed", refreshed_noise) if refreshed_noise else None,
        domain_names={},
    )


def section_of(refreshed_noise: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr("nla_ray.report.evaluated.SCORERS", ("reward",))
    return two_by_two(FamilyBootstrap(DOC_IDS, 100, 0), evaluated(refreshed_noise))


def test_a_gain_that_the_refreshed_scorer_does_not_see_is_the_scorers_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = section_of({"gold": 0.2, "sft": 1.0, "grpo": 1.0}, monkeypatch)
    assert set(section) == {"gold", "sft", "grpo", "grpo-sft"}, "no control, and none unread"
    pair = {scorer: named["centred_cosine"] for scorer, named in section["grpo-sft"].items()}
    assert pair["reward"].low > 0 and pair["refreshed"].value == 0.0
    assert pair["difference"].value == pytest.approx(-pair["reward"].value)
    sft = {scorer: named["centred_cosine"].value for scorer, named in section["sft"].items()}
    assert sft["difference"] == 0.0 and sft["reward"] == sft["refreshed"]
    grpo = {scorer: named["centred_cosine"].value for scorer, named in section["grpo"].items()}
    assert pair["reward"].value == pytest.approx(grpo["reward"] - sft["reward"])
    as_json = {
        name: {
            scorer: {metric: figure.to_dict() for metric, figure in named.items()}
            for scorer, named in by_scorer.items()
        }
        for name, by_scorer in section.items()
    }
    cosines, *_ = refreshed_section({"refreshed": as_json}).blocks
    assert [row.title for row in cosines.rows] == ["gold", "sft", "grpo", "grpo − sft"]
    assert cosines.rows[-1].cells[1]["value"] == 0.0


def test_a_report_without_a_refreshed_scorer_has_no_such_section(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert section_of(None, monkeypatch) == {} and refreshed_section({}).blocks == []


def test_the_report_is_made_with_the_refreshed_scorer_where_it_is_complete(
    published_run: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(published_run.run_dir, tmp_path / "run")
    evaluation = dataclasses.replace(published_run.evaluation, samples=0)
    config = dataclasses.replace(
        published_run, run_dir=str(tmp_path / "run"), evaluation=evaluation
    )
    run = Run(config)
    documents = run.require("reward_scorer").documents["train"]
    publish_scorer(run, "reward_scorer_refreshed", 5, documents)
    make_report(config)
    report = read_report(run)
    assert "reward_scorer_refreshed" in run.require("report").parents
    assert {"gold", "sft", "grpo", "grpo-sft"} == set(report["refreshed"])
    assert (
        report["refreshed"]["sft"]["reward"]["centred_cosine"]
        == (report["results"]["sft"]["reward"]["centred_cosine"])
    )
    (run.root / "report").delete()
    judged = run.require("judge_scorer").documents["train"]
    refreshed = dataclasses.replace(
        run.require("reward_scorer_refreshed"), documents={"train": [*documents, judged[0]]}
    )
    (run.root / "reward_scorer_refreshed/manifest.json").write_text(refreshed.to_json())
    with pytest.raises(ValueError, match="reward_scorer_refreshed and judge_scorer share 1 train"):
        make_report(config)
