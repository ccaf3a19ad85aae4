"""What the report says of claims' confidence, on claims whose outcomes are known."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from nla_ray.base.load import load_tokenizer
from nla_ray.description.record import Description
from nla_ray.report.claim_confidence import (
    JudgedClaims,
    claim_confidence_section,
    claim_probabilities,
    confident_descriptions,
    judged_claims,
)
from nla_ray.report.gates import check_gates, judge_gate
from nla_ray.report.stage import make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.claim_confidence import ClaimConfidence
from nla_ray.score.cross_fit import CalibratedProbe
from nla_ray.score.probe import WordProbe
from nla_ray.settings.config import BaseConfig, ClaimConfidenceConfig, EvaluationConfig, RunConfig
from nla_ray.settings.presets import nano
from nla_ray.training.claim_confidence import fit_claim_confidence

BOOTSTRAP = FamilyBootstrap(["a", "b", "c"], resamples=50, seed=0)


def rows(*claims: tuple[float, float]) -> JudgedClaims:
    """Twenty claims of two rows for each (probability, outcome); a third row claims nothing."""
    first, second = list(claims[::2]) * 20, list(claims[1::2]) * 20
    parts = [torch.tensor(part, dtype=torch.float64).reshape(-1, 2) for part in (first, second, [])]
    return JudgedClaims(
        probabilities=[part[:, 0] for part in parts], found=[part[:, 1] for part in parts]
    )


JUDGED = rows((0.95, 1.0), (0.95, 0.0), (0.55, 0.0))


def test_claims_are_counted_by_what_is_kept_of_them() -> None:
    section = claim_confidence_section(BOOTSTRAP, JUDGED)
    assert section["claims"] == 60
    kept = {name: figures for name, figures in section.items() if name.startswith("kept_")}
    assert [kept[name]["share"].value for name in ("kept_50", "kept_60", "kept_90")] == (
        pytest.approx([1.0, 2 / 3, 2 / 3])
    )
    assert kept["kept_50"]["precision"].value == pytest.approx(1 / 3)
    assert kept["kept_90"]["precision"].value == pytest.approx(1 / 2)


def test_bins_brier_score_and_calibration_error() -> None:
    section = claim_confidence_section(BOOTSTRAP, JUDGED)
    assert [bin["claims"] for bin in section["bins"]] == [20, 40]
    assert [bin["confidence"] for bin in section["bins"]] == pytest.approx([0.55, 0.95])
    assert [bin["found"].value for bin in section["bins"]] == pytest.approx([0.0, 0.5])
    assert section["brier"].value == pytest.approx((0.05**2 + 0.55**2 + 0.95**2) / 3)
    assert section["brier_constant"].value == pytest.approx((4 / 9 + 1 / 9 + 1 / 9) / 3)
    assert section["calibration_error"] == pytest.approx((0.55 + 2 * 0.45) / 3)


def test_where_nothing_is_claimed_or_nobody_says_how_likely_there_is_no_section() -> None:
    silent = JudgedClaims(probabilities=[torch.empty(0)] * 3, found=[torch.empty(0)] * 3)
    assert claim_confidence_section(BOOTSTRAP, None) == {}
    assert claim_confidence_section(BOOTSTRAP, silent) == {}


def test_where_few_claims_are_kept_their_precision_is_not_said() -> None:
    few = JudgedClaims(probabilities=[torch.tensor([0.95])] * 3, found=[torch.tensor([1.0])] * 3)
    section = claim_confidence_section(BOOTSTRAP, few)
    assert set(section["kept_80"]) == {"share"} and section["kept_80"]["share"].value == 1.0


def test_claims_are_judged_by_the_text_of_their_row() -> None:
    probe = CalibratedProbe(
        probe=WordProbe(
            words=["frame"],
            weight=torch.ones(1, 2),
            feature_mean=torch.zeros(2),
            mean=torch.zeros(2),
        ),
        log_odds=torch.zeros(1),
        coefficients=torch.tensor([0.0, 1.0, 0.0, 0.0]),
    )
    confidence = ClaimConfidence(probe=probe, weights=torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))
    said = Description.from_text(
        "- tokens: frame, qux", num_tokens=5, claim_log_probs={"frame": -1.0, "qux": -2.0}
    )
    sample = Description.from_text("- tokens: frame", num_tokens=3)
    likely = claim_probabilities(confidence, torch.randn(2, 2), [said, said], [[sample], [sample]])
    assert likely is not None
    judged = judged_claims(likely, [said.text, said.text], ["a frame", "qux"])
    assert [row.tolist() for row in judged.found] == [[1.0, 0.0], [0.0, 1.0]]
    expected = torch.sigmoid(torch.tensor([-1.0, -2.0])).tolist()
    assert judged.probabilities[0].tolist() == pytest.approx(expected, abs=1e-6)
    unknown = [said, Description.from_text("- tokens: frame", num_tokens=3)]
    cut_otherwise = [said, dataclasses.replace(said, claim_log_probs={"frame": -1.0})]
    for described in (unknown, cut_otherwise):
        drawn = [[sample], [sample]]
        assert claim_probabilities(confidence, torch.randn(2, 2), described, drawn) is None


def test_what_is_left_of_a_description_are_its_likely_claims(tiny_base: BaseConfig) -> None:
    tokenizer = load_tokenizer(tiny_base)
    said = Description.from_text(
        "- tokens: frame, qux\n- next: a list",
        num_tokens=20,
        claim_log_probs={"frame": -1.0, "qux": -2.0},
    )
    likely = {"frame": 0.6, "qux": 0.5}
    every, [half], none = (
        confident_descriptions(tokenizer, [said], [likely], least) for least in (0.5, 0.55, 0.7)
    )
    assert every[0].text == said.text
    assert half.text == "- tokens: frame\n- next: a list"
    assert half.num_tokens == len(tokenizer.encode(half.text, add_special_tokens=False))
    assert none[0].text == "- tokens: no word stands out\n- next: a list"


def test_a_report_keeps_likely_claims_only_where_their_confidence_is_honest() -> None:
    for evaluation in (
        EvaluationConfig(min_claim_confidence=1.5),
        EvaluationConfig(min_claim_confidence=0.5, split="validation"),
        EvaluationConfig(min_claim_confidence=0.5, samples=3),
    ):
        with pytest.raises(ValueError, match=r"evaluation\.min_claim_confidence"):
            dataclasses.replace(nano(), evaluation=evaluation)


def test_a_gate_can_ask_for_the_precision_of_what_is_kept() -> None:
    gate = ("claim_confidence.kept_80.precision", ">=", 0.9)
    check_gates([gate])
    figure = {"value": 0.95, "low": 0.91, "high": 0.98}
    summary = {"claim_confidence": {"kept_80": {"precision": figure}}}
    assert judge_gate(summary, gate)["passed"]
    assert judge_gate({"claim_confidence": {}}, gate)["value"] is None
    with pytest.raises(ValueError, match="claim_confidence"):
        check_gates([("claim_confidence.kept_85.precision", ">=", 0.9)])


def test_a_report_judges_the_claims_of_its_arm_where_their_confidence_was_learned(
    published_run: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(published_run.run_dir, tmp_path / "run")
    config = dataclasses.replace(
        published_run,
        run_dir=str(tmp_path / "run"),
        evaluation=dataclasses.replace(published_run.evaluation, samples=2),
        claim_confidence=ClaimConfidenceConfig(max_activations=4, samples=1),
    )
    fit_claim_confidence(config)
    make_report(config)
    run, folder = Run(config), tmp_path / "run" / "report"
    assert "claim_confidence" in run.require("report").parents
    file = folder / "descriptions" / "grpo.jsonl"
    head, *lines = map(json.loads, file.read_text().splitlines())
    assert all("claim_log_probs" in line for line in lines)
    assert "claim_log_probs" not in (folder / "descriptions" / "sft.jsonl").read_text()
    (folder / "manifest.json").unlink()
    claimed = {
        "description": "- tokens: frame, quxly",
        "claim_log_probs": {"frame": -0.1, "quxly": -3.0},
    }
    written = [head, *({**line, **claimed} for line in lines)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in written))
    evaluation = dataclasses.replace(config.evaluation, min_claim_confidence=1.0)
    make_report(dataclasses.replace(config, evaluation=evaluation))
    section = read_report(run)["claim_confidence"]
    assert section["claims"] == 2 * len(lines)
    precision = read_report(run)["claims"]["grpo"]["precision"]["value"]
    found = sum(bin["claims"] * bin["found"]["value"] for bin in section["bins"])
    assert found == pytest.approx(precision * 2 * len(lines), abs=1e-3)
    assert read_report(run)["claims"]["grpo_confident"]["precision"]["value"] == 0.0
    assert "grpo_confident-grpo" in read_report(run)["paired"]
    kept = (folder / "descriptions" / "grpo_confident.jsonl").read_text().splitlines()
    assert json.loads(kept[0]) == {"protocol": "not generated"}
    assert [json.loads(line)["description"] for line in kept[1:]] == [
        "- tokens: no word stands out"
    ] * len(lines)
