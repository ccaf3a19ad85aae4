"""The card of a preset: every figure of its report, how to make it again, and not one text."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sample_report import HOSTILE, full_report

from nla_ray.report import cards
from nla_ray.report.rendering.card import commands_of, to_card
from nla_ray.report.rendering.content import interval
from nla_ray.report.rendering.curves import word_chart
from nla_ray.report.rendering.picture import line_picture
from nla_ray.report.stage import make_report, publish_card, read_report
from nla_ray.run.artifact import Run
from nla_ray.settings.config import RunConfig
from nla_ray.settings.presets import PRESETS, preset

SECONDS = {"corpus": 20.5, "sft": 1_179.5}


def card_of(report: dict) -> str:
    return to_card(report, seconds=SECONDS, commands=["make it"], findings="## Found\n\nIt works.")


def test_a_card_holds_no_text_of_the_corpus_and_no_description() -> None:
    example = {
        "activation_id": "secret-document@4:1",
        "domain": "licence",
        "text": f"a secret text {HOSTILE}",
        "descriptions": {"grpo": "- a secret description"},
    }
    report = {**full_report(), "examples": [example], "warnings": []}
    card = card_of(report)
    assert "secret" not in card and HOSTILE not in card and "## Example" not in card


def test_a_card_holds_figures_notes_seconds_commands_and_findings() -> None:
    report = full_report()
    card = card_of(report)
    shown = [
        *report["results"]["shuffled"]["judge"].values(),
        *report["claims"]["grpo"].values(),
        *report["paired"]["grpo-sft"]["judge"].values(),
        report["domains"]["licence"]["grpo"]["precision"],
        report["growth"]["labels"]["judge"][2]["top1_2way"],
        report["best_of"][2]["judge"]["top1"],
        report["experiments"][0]["minus_sft"]["judge's centred cosine"],
    ]
    for figure in shown:
        assert interval(figure) in card
    for line in (
        "- 1 of 2 gates passed",
        "| sft.claims.repeats | – | < 0.1 | FAIL |",
        "- Greedy decoding.",
        "| sft | 1,179.5 |\n| all stages | 1,200.0 |",
        "```bash\nmake it\n```",
        "## Found\n\nIt works.\n\n## Lineage",
    ):
        assert line in card


def test_a_card_shows_its_picture_and_the_picture_every_point() -> None:
    report = full_report()
    assert "![" not in card_of(report)
    card = to_card(report, seconds={}, commands=["make it"], picture="nano.svg")
    assert "![Share of claims in the text by number of claims](nano.svg)" in card
    root = ElementTree.fromstring(line_picture(word_chart(report)))
    tag = "{http://www.w3.org/2000/svg}"
    points = [point for points in report["word_curve"].values() for point in points]
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{tag}circle")]
    assert len(circles) == len(points) == 6
    by_words = [round((x - 60) / (580 - 60) * 2.6, 2) for x, _ in circles]
    assert by_words == pytest.approx([point["words"] for point in points], abs=0.01)
    shares = [(350 - y) / (350 - 40) for _, y in circles]
    assert shares == pytest.approx([point["found"]["value"] for point in points], abs=0.001)
    texts = [text.text for text in root.iter(f"{tag}text")]
    assert {"linear probe", "grpo", "claims of a description, mean"} <= set(texts)


def test_texts_written_for_a_card_stand_in_fences_with_their_scores() -> None:
    example = {"text": "```\nwritten", "description": "- code", "right": 0.53, "wrong": -0.0123}
    card = to_card(full_report(), seconds={}, commands=["make it"], examples=[example])
    assert (
        "## Texts written for this card\n\n````text\n"
        "text         ```\n"
        "             written\n"
        "description  - code\n"
        "score        centred cosine 0.530 with its own activation, -0.012 with the other text's"
        " (judge)\n````\n" in card
    )


def test_commands_name_every_setting_that_differs_and_of_a_file_its_name_alone() -> None:
    defaults = {
        "corpus": {"path": None, "seed": 0},
        "sft": {"epochs": 1, "labels": ["one"], "shuffle": True},
        "evaluation": {"gates": []},
    }
    recorded = {
        "corpus": {"path": "/home/someone/my texts.jsonl", "seed": 0},
        "sft": {"epochs": 2, "labels": ["one", "two"], "shuffle": False},
        "evaluation": {"gates": [["sft.judge.top1", ">=", 0.9]]},
        "of_an_earlier_version": {"x": 1},
    }
    flags = "--corpus.path 'my texts.jsonl' --sft.epochs 2 --sft.labels one two --sft.no-shuffle"
    assert commands_of("other", recorded, defaults) == [
        f"python jobs/pipeline.py --preset other {flags}",
        f"python jobs/evaluate.py --preset other {flags} --card",
    ]
    assert commands_of("nano", defaults, defaults) == [
        "python jobs/pipeline.py",
        "python jobs/evaluate.py --card",
    ]


def test_a_card_is_made_of_no_other_report_than_the_presets_own() -> None:
    nano = preset("nano")
    on_validation = dataclasses.replace(nano.evaluation, split="validation")
    config = dataclasses.replace(nano, evaluation=on_validation)
    with pytest.raises(ValueError, match="--card: got the report 'report_validation', expected"):
        publish_card(Run(config), {})


def test_the_published_report_becomes_the_card_of_its_preset(
    published_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(published_run.run_dir, tmp_path / "run")
    run = Run(dataclasses.replace(published_run, run_dir=str(tmp_path / "run")))
    make_report(run.config)
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    report = read_report(run)
    path = publish_card(run, report)
    card = path.read_text(encoding="utf-8")
    assert path == tmp_path / f"{run.config.preset}.md"
    assert f"]({run.config.preset}.svg)" in card
    assert (tmp_path / f"{run.config.preset}.svg").read_text().startswith("<svg")
    assert interval(report["results"]["grpo"]["judge"]["top1"]) in card
    [command] = re.findall(r"python jobs/pipeline.py .*", card)
    assert "--base.model" in command and "/" not in command.removeprefix("python jobs/pipeline.py")
    for example in report["examples"]:
        assert example["text"] not in card


@pytest.mark.parametrize("path", sorted(cards.FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_a_shipped_card_is_of_a_preset_and_says_how_to_make_it_again(path: Path) -> None:
    assert path.stem in PRESETS
    card = path.read_text(encoding="utf-8")
    assert card.startswith(f"# Card of preset `{path.stem}`\n")
    assert "python jobs/pipeline.py" in card and "### Example" not in card
    assert cards.findings(path.stem).strip() in card
    for experiment in cards.experiments(path.stem):
        assert f"| {experiment['changed']} | " in card
    assert not re.findall(r"\(/(?:home|tmp|root)/", card)
