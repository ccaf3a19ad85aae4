"""Seeds: which trainings differ by nothing else, and how far their figures spread."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from tiny_artifacts import publish_verbalizer

from nla_ray.report import cards
from nla_ray.report.rendering.card import commands_of
from nla_ray.report.rendering.seeds import seeds_section
from nla_ray.report.seeds import differs_in_seed, spread_of
from nla_ray.report.stage import make_report, publish_card, read_report
from nla_ray.run.artifact import Run
from nla_ray.run.manifest import FileRecord, Manifest
from nla_ray.settings.config import RunConfig


def manifest(name: str, parents: dict[str, Manifest], content: str, **section: object) -> Manifest:
    return Manifest(
        name=name,
        config={name: section},
        config_hash=str(section),
        parents={parent: found.fingerprint for parent, found in parents.items()},
        files={"weights": FileRecord(size=1, sha256=content)},
    )


def a_run(seed: int, *, texts: str = "texts", rate: float = 4e-3) -> dict[str, Manifest]:
    """corpus -> sft -> grpo, both trained with a seed."""
    corpus = manifest("corpus", {}, texts, path="my texts")
    sft = manifest("sft", {"corpus": corpus}, f"sft {seed}", seed=seed, learning_rate=rate)
    grpo = manifest("grpo", {"sft": sft}, f"grpo {seed}", seed=seed, steps=80)
    return {"corpus": corpus, "sft": sft, "grpo": grpo}


def test_runs_that_differ_by_seeds_alone_are_recognised_through_all_their_ancestors() -> None:
    ours, theirs = a_run(0), a_run(1)
    assert differs_in_seed(theirs["sft"], ours["sft"], theirs.get, ours.get)
    assert differs_in_seed(theirs["grpo"], ours["grpo"], theirs.get, ours.get)
    assert not differs_in_seed(ours["grpo"], ours["grpo"], ours.get, ours.get)
    assert not differs_in_seed(theirs["grpo"], ours["sft"], theirs.get, ours.get)


def test_another_setting_or_other_texts_anywhere_among_the_ancestors_is_no_seed() -> None:
    ours = a_run(0)
    for theirs in (a_run(1, rate=1e-3), a_run(1, texts="other texts")):
        for name in ("sft", "grpo"):
            assert not differs_in_seed(theirs[name], ours[name], theirs.get, ours.get)


def test_a_repetition_under_the_same_seed_is_no_other_seed() -> None:
    ours, theirs = a_run(0), a_run(0)
    again = dataclasses.replace(ours["grpo"], files={"weights": FileRecord(size=1, sha256="b")})
    assert again.fingerprint != ours["grpo"].fingerprint
    assert not differs_in_seed(again, ours["grpo"], theirs.get, ours.get)


def test_what_an_artifact_was_made_from_must_lie_beside_it_to_be_compared() -> None:
    ours, theirs = a_run(0), a_run(1)
    assert not differs_in_seed(theirs["grpo"], ours["grpo"], {}.get, ours.get)
    other = {"sft": a_run(2)["sft"]}
    assert not differs_in_seed(theirs["grpo"], ours["grpo"], other.get, ours.get)


def test_the_spread_is_the_standard_deviation_over_n_less_one() -> None:
    found = spread_of({"a": {"value": 1.0}, "b": {"value": 2.0}, "c": {"value": 6.0}})
    # deviations -2, -1, 3 from the mean 3: (4 + 1 + 9) / 2 = 7
    assert found["mean"] == 3.0 and found["spread"] == pytest.approx(7**0.5)


def test_a_report_of_seeds_shows_every_training_with_its_interval_and_the_spread(
    published_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(published_run.run_dir, tmp_path / "run")
    evaluation = dataclasses.replace(published_run.evaluation, samples=0)
    config = dataclasses.replace(
        published_run, run_dir=str(tmp_path / "run"), evaluation=evaluation, seeds=(0, 1)
    )
    run = Run(config)
    with pytest.raises(ValueError, match=r"artifact 'grpo_seed1': got none .*jobs/grpo\.py"):
        make_report(config)
    publish_verbalizer(Run(config.with_seed("grpo", 1)), "grpo_seed1", seed=7)
    make_report(config)
    assert run.find("report") is None
    report = read_report(run)
    assert list(report["seeds"]) == ["grpo"]
    trained = report["seeds"]["grpo"]
    assert trained["seeds"] == {"grpo": 0, "grpo_seed1": 1}
    cosine = trained["figures"]["judge"]["centred_cosine"]
    values = [report["results"][name]["judge"]["centred_cosine"] for name in trained["seeds"]]
    assert list(cosine["by_seed"].values()) == values
    first, second = (figure["value"] for figure in values)
    assert cosine["spread"] == pytest.approx(abs(first - second) / 2**0.5, abs=2e-6)
    paired = trained["minus_sft"]["claims"]["precision"]["by_seed"]["grpo_seed1"]
    assert paired == report["paired"]["grpo_seed1-sft"]["claims"]["precision"]
    figures, minus_sft = seeds_section(report).blocks
    assert figures.heads == ["figure", "grpo (seed 0)", "grpo seed1 (seed 1)", "mean", "spread"]
    assert minus_sft.title == "grpo − sft, paired"
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    card = publish_card(run, report).read_text()
    assert "## Spread over seeds" in card and "--seeds 0 1" in card
    assert seeds_section({}).blocks == [], "a report of an earlier version has none"


def test_the_commands_of_a_card_train_the_seeds_that_it_shows() -> None:
    assert commands_of("nano", {}, {}, (0, 1, 2)) == [
        "python jobs/pipeline.py --seeds 0 1 2",
        "python jobs/evaluate.py --seeds 0 1 2 --card",
    ]


def test_what_was_tried_has_its_number_of_seeds_and_their_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    row = {"changed": "no KL", "kept": "no", "n": 9, "minus_sft": {"words": {"value": 1.0}}}
    seeded = {**row, "other_seeds": [{"words": 2.0}, {"words": 6.0}]}
    (tmp_path / "tiny_experiments.json").write_text(cards.json.dumps([row, seeded]))
    single, several = cards.experiments("tiny")
    assert (single["seeds"], single["spread"]) == (1, {})
    assert several["seeds"] == 3 and several["spread"]["words"] == pytest.approx(7**0.5)
