"""The report: controls, figures, gates, tables, and the stage on a small real run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from sample_report import minimal_report
from tiny_artifacts import join_families

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations
from nla_ray.base.pretrained import digest
from nla_ray.base.prompts import GENERIC_DESCRIPTION
from nla_ray.description.protocol import GenerationProtocol
from nla_ray.description.record import Description
from nla_ray.report import controls, describing
from nla_ray.report.claim_figures import CLAIM_FIGURES
from nla_ray.report.controls import pairs_of
from nla_ray.report.evaluated import Evaluated, forms_of
from nla_ray.report.gates import check_gates, judge_gate
from nla_ray.report.growth import growth
from nla_ray.report.readings import Readings
from nla_ray.report.rendering.content import interval
from nla_ray.report.rendering.domains import domains_table
from nla_ray.report.rendering.markdown import to_markdown
from nla_ray.report.rendering.sections import opening
from nla_ray.report.samples import rank_correlation
from nla_ray.report.stage import check_corpus, evaluate, make_report, read_report, show_report
from nla_ray.report.summary import summarise
from nla_ray.run.artifact import Run
from nla_ray.run.location import Location
from nla_ray.run.manifest import Manifest
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.metrics import METRICS
from nla_ray.settings.config import EvaluationConfig, GRPOSettings, RunConfig
from nla_ray.settings.presets import PRESETS

ROWS = 24
DOC_IDS = [f"doc{row // 2}" for row in range(ROWS)]
DOMAINS = ["python_test" if row % 4 < 2 else "licence" for row in range(ROWS)]
TEXTS = [f"assert frame{'abcdefghijklmnopqrstuvwx'[row]}x == index" for row in range(ROWS)]
SCORERS = ("reward", "judge", "linear")
NAMES = {"python_test": "Python test", "licence": "licence"}


def described(texts: list[str], closed: bool = True) -> list[Description]:
    return [
        Description.from_text(text, num_tokens=len(text.split()), closed=closed) for text in texts
    ]


def evaluated() -> Evaluated:
    """Gold and sft reconstruct well, sft a little worse, generic not at all."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(ROWS, 8, generator=generator) + 1.0
    mean = torch.full((8,), 0.2)
    noise = torch.randn(ROWS, 8, generator=generator)
    descriptions = {
        "gold": described(
            [f"- Python test: frame, index\n- tokens: assert\n- next: {row}" for row in range(ROWS)]
        ),
        "sft": described(["- licence: index, index", ""] * (ROWS // 2), closed=False),
        "grpo": described([f"- Python test: index\n- tokens: row{row}" for row in range(ROWS)]),
    }
    scale = {"gold": 0.2, "sft": 0.8, "grpo": 0.5}
    # Every description is said of one row only, so that a text can stand for what is read in it.
    for name, of_rows in descriptions.items():
        descriptions[name] = [
            dataclasses.replace(
                description, text=description.text and f"{description.text}\n- next: {name} {row}"
            )
            for row, description in enumerate(of_rows)
        ]
    samples = [
        [
            Description.from_text(f"- Python test: sample{row}x{number}", num_tokens=5)
            for number in range(2)
        ]
        for row in range(ROWS)
    ]
    read: dict[str, torch.Tensor] = {"": mean}
    for name, of_rows in descriptions.items():
        for row, description in enumerate(of_rows):
            if description.text:
                reconstruction = originals[row] + scale[name] * noise[row]
                read |= dict.fromkeys(forms_of(description.text), reconstruction)
    for row, drawn in enumerate(samples):
        for number, sample in enumerate(drawn):
            read[sample.text] = originals[row] + number * noise[row]
    return Evaluated(
        doc_ids=DOC_IDS,
        family_ids=DOC_IDS,
        domains=DOMAINS,
        texts=TEXTS,
        salient=[["assert", "index"]] * ROWS,
        comparisons=Comparisons.draw(originals, DOC_IDS, mean, 0, DOMAINS),
        descriptions=descriptions,
        samples=samples,
        sampled="grpo",
        prefix_rows=range(0, ROWS, 2),
        prefixes={"gold": {4: [description.text for description in descriptions["sft"][::2]]}},
        readings=Readings(list(read), dict.fromkeys(SCORERS, torch.stack(list(read.values())))),
        domain_names=NAMES,
    )


@pytest.fixture(scope="module")
def summary() -> dict:
    gates = (
        ("grpo-sft.judge.centred_cosine", ">", 0.0),
        ("sft.claims.repeats", "<", 0.1),
        ("grpo.claims.precision", ">=", 0.4),
    )
    return summarise(evaluated(), gates, resamples=300, seed=0)


# Controls -----------------------------------------------------------------------------------------


def test_gold_is_the_label_of_the_text_and_without_a_label_the_empty_description() -> None:
    assert controls.label_descriptions(
        "gold", ["a#0", "b#0"], ["a", "b"], {"b#0": "B"}, seed=0
    ) == ["", "B"]


def test_shuffled_labels_come_from_other_documents_and_not_from_the_wrong_row() -> None:
    ids = [f"t{row}" for row in range(ROWS)]
    shuffled = controls.label_descriptions(
        "shuffled", ids, DOC_IDS, {name: name for name in ids}, seed=0
    )
    sources = [int(name[1:]) for name in shuffled]
    assert sorted(sources) == list(range(ROWS))
    assert all(DOC_IDS[source] != DOC_IDS[row] for row, source in enumerate(sources))
    assert sources != evaluated().comparisons.wrong.tolist()


def test_the_generic_control_says_one_sentence_of_everything() -> None:
    assert (
        controls.label_descriptions("generic", ["a", "b"], ["a", "b"], {}, seed=0)
        == [GENERIC_DESCRIPTION] * 2
    )
    with pytest.raises(ValueError, match="gold, shuffled or generic"):
        controls.label_descriptions("sft", [], [], {}, seed=0)


def test_the_nearest_train_label_is_that_of_the_highest_centred_cosine() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    labels = {"x": "X", "y": "Y", "z": "Z"}
    test = torch.tensor([[3.0, 3.1], [0.1, 5.0]])
    assert controls.nearest_train_labels(test, train, ["x", "y", "z"], labels, torch.zeros(2)) == [
        "Z",
        "Y",
    ]
    assert controls.nearest_train_labels(
        test, train, ["x", "y", "z"], {"x": "X", "y": "Y"}, torch.zeros(2)
    ) == ["Y", "Y"]
    with pytest.raises(ValueError, match="got none for 3"):
        controls.nearest_train_labels(test, train, ["x", "y", "z"], {}, torch.zeros(2))


def test_a_random_vector_depends_on_the_id_alone_and_the_mean_is_one_row_for_all() -> None:
    means = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    drawn = controls.injected_vectors("random_vector", ["a", "b"], means, seed=0)
    swapped = controls.injected_vectors("random_vector", ["b", "a"], means, seed=0)
    assert drawn.shape == (2, 2, 2) and torch.equal(swapped.flip(0), drawn)
    assert drawn[0].tolist() != drawn[1].tolist()
    mean = controls.injected_vectors("mean_activation", ["a", "b"], means, seed=0)
    assert mean.tolist() == [means.tolist()]


def test_the_mean_that_is_injected_is_that_of_what_stands_for_an_activation() -> None:
    mean, rows = torch.tensor([0.6, 0.7]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    names = ["a", "b"]
    table = ActivationTable(
        ids=names,
        text_ids=names,
        doc_ids=names,
        family_ids=names,
        domains=names,
        texts=names,
        vectors=rows,
    )
    assert torch.equal(controls.injected_means(table, mean), mean[None])
    other = dataclasses.replace(table, views=torch.tensor([[[0.0, 9.0]], [[0.0, 1.0]]]))
    assert controls.injected_means(other, mean).tolist() == [[0.0, 1.0]]


# Figures ------------------------------------------------------------------------------------------


def test_every_verbalizer_scorer_and_metric_has_a_value_an_interval_and_n(summary: dict) -> None:
    assert set(summary["results"]) == {"gold", "sft", "grpo"}
    for by_scorer in summary["results"].values():
        assert tuple(by_scorer) == SCORERS
        for named in by_scorer.values():
            assert tuple(named) == tuple(
                metric for metric in METRICS if metric != "top1_100way"
            )  # there are 24 rows
            for figure in named.values():
                assert set(figure) == {"value", "low", "high", "n", "families"}
                assert figure["low"] <= figure["value"] <= figure["high"] and (
                    figure["n"],
                    figure["families"],
                ) == (24, 12)


def test_claims_are_counted_over_all_descriptions_empty_ones_too(summary: dict) -> None:
    said = {
        name: {figure: value["value"] for figure, value in named.items()}
        for name, named in summary["claims"].items()
    }
    assert tuple(said["gold"]) == tuple(CLAIM_FIGURES)
    assert (
        "hallucinated" not in said["sft"]
        and said["gold"]["hallucinated"] == 0.0
        and said["grpo"]["hallucinated"] == 1.0
    )
    # every text has "assert" and "index", and so has every other
    assert (
        said["gold"]["precision_excess"] == 0.0
        and said["gold"]["source_recall"] == 1.0
        and said["sft"]["source_recall"] == 0.25
    )
    # gold claims frame, index, assert; "framea" hides frame, so 2 of 3 are found
    assert said["gold"]["precision"] == pytest.approx(2 / 3)
    assert said["gold"]["domain"] == 0.5 and said["gold"]["recall"] == 1.0
    # every other sft description is empty: precision (1 + 0) / 2, and only its licence half can be
    # right
    assert (
        said["sft"]["precision"] == 0.5
        and said["sft"]["empty"] == 0.5
        and said["sft"]["repeats"] == 0.5
    )
    assert said["sft"]["unclosed"] == 1.0 and said["sft"]["distinct"] == pytest.approx(13 / 24)
    assert said["sft"]["recall"] == pytest.approx((1 / 3 + 0) / 2) and said["sft"][
        "tokens"
    ] == pytest.approx(2.0)
    assert said["sft"]["domain"] == 0.25
    assert said["grpo"]["distinct"] == 1.0


def test_paired_differences_are_those_of_the_values(summary: dict) -> None:
    judge = summary["paired"]["grpo-sft"]["judge"]
    results = summary["results"]
    for metric, difference in judge.items():
        assert difference["value"] == pytest.approx(
            results["grpo"]["judge"][metric]["value"] - results["sft"]["judge"][metric]["value"]
        )
    assert summary["paired"]["grpo-sft"]["claims"]["empty"]["value"] == -0.5
    ratio = results["grpo"]["judge"]["delta"]["value"] / results["sft"]["judge"]["delta"]["value"]
    assert summary["ratios"]["grpo/sft"]["judge"]["delta"]["value"] == pytest.approx(ratio)
    assert "grpo-nearest_train_label" not in summary["paired"]


def test_scorers_that_agree_everywhere_agree_fully(summary: dict) -> None:
    assert set(summary["agreement"]["sft"]) == {"reward/judge", "reward/linear", "judge/linear"}
    assert summary["agreement"]["sft"]["reward/judge"] == pytest.approx(
        {"top1": 1.0, "centred_cosine": 1.0}
    )
    assert summary["gaps"]["sft"]["value"] == 0.0 and summary["warnings"] == []


def test_a_prefix_curve_ends_with_the_whole_description_of_the_same_rows(summary: dict) -> None:
    first, whole = summary["prefix"]["gold"]["judge"]
    assert (first["tokens"], whole["tokens"]) == (4, 11) and first["centred_cosine"]["n"] == whole[
        "centred_cosine"
    ]["n"] == 12
    # What stands for its prefixes is said by sft.
    assert first["centred_cosine"]["value"] < whole["centred_cosine"]["value"]


def test_domains_and_the_confusion_matrix_count_every_row(summary: dict) -> None:
    assert summary["confusion"]["gold"] == {
        "licence": {"python_test": 12},
        "python_test": {"python_test": 12},
    }
    assert summary["confusion"]["sft"]["licence"] == {"licence": 6, "none": 6}
    assert summary["domains"]["licence"]["gold"]["domain"]["value"] == 0.0
    assert set(summary["domains"]["licence"]) == set(summary["results"])
    assert {f"{scorer}.centred_cosine" for scorer in SCORERS} < set(
        summary["domains"]["licence"]["sft"]
    )
    figure = {"precision": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 12}}
    assert domains_table({"domains": {"licence": {"gold": figure, "shuffled": figure}}}).heads[
        2:
    ] == ["gold: words in text", "gold: domain right", "gold: judge's centred cosine"]
    assert summary["domains"]["python_test"]["gold"]["domain"] == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "n": 12,
        "families": 6,
    }


def test_other_verbalizers_are_paired_with_the_runs_own_and_with_each_other() -> None:
    pairs = pairs_of(["gold", "sft", "grpo", "one", "two"])
    assert pairs == [
        ("grpo", "sft"),
        ("one", "grpo"),
        ("one", "sft"),
        ("two", "grpo"),
        ("two", "sft"),
        ("one", "two"),
    ]


# Gates --------------------------------------------------------------------------------------------


def test_a_gate_judges_the_bound_that_is_worse_for_the_claim(summary: dict) -> None:
    first, second, third = summary["gates"]
    assert (
        first["value"] == summary["paired"]["grpo-sft"]["judge"]["centred_cosine"]["low"]
        and first["passed"]
    )
    assert second["value"] == summary["claims"]["sft"]["repeats"]["high"] and not second["passed"]
    assert third["value"] == summary["claims"]["grpo"]["precision"]["low"]


@pytest.mark.parametrize(
    ("relation", "threshold", "passed"),
    [
        (">=", 0.5, True),
        (">", 0.5, False),
        (">=", 0.51, False),
        ("<", 0.7, False),
        ("<=", 0.7, True),
        ("<", 0.71, True),
    ],
)
def test_relations_of_gates(relation: str, threshold: float, passed: bool) -> None:
    summary = {"results": {"sft": {"judge": {"top1": {"value": 0.6, "low": 0.5, "high": 0.7}}}}}
    gate = judge_gate(summary, ("sft.judge.top1", relation, threshold))
    assert gate == {
        "name": "sft.judge.top1",
        "relation": relation,
        "threshold": threshold,
        "passed": passed,
        "value": 0.5 if relation.startswith(">") else 0.7,
    }


def test_a_gate_on_an_arm_that_was_not_trained_fails_without_a_value(summary: dict) -> None:
    gate = judge_gate(summary, ("grpo_no_contrast.judge.top1", ">=", 0.1))
    assert gate["value"] is None and not gate["passed"]


def test_the_rank_correlation_gives_equal_values_the_mean_of_their_ranks() -> None:
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Pearson of these is 4.5 / sqrt(4.5 * 5)
    first, second = torch.tensor([0.1, 1.0, 1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0, 6.0])
    assert rank_correlation(first, second) == pytest.approx((4.5 / 5) ** 0.5)
    assert rank_correlation(second, -second) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "gate",
    [
        ("sft.judge.top2", ">=", 0.1),
        ("sft.top1", ">=", 0.1),
        ("other.judge.top1", ">=", 0.1),
        ("sft.judge.top1", "=", 0.1),
        ("sft.claims.top1", ">=", 0.1),
        ("sft-other.judge.top1", ">=", 0.1),
        ("sft-shuffled.judge.top1", ">=", 0.1),
        ("grpo/sft.judge.top1", ">=", 0.1),
        ("grpo/sft.claims.domain", ">=", 0.1),
        ("confidence.judge.fve", ">=", 0.1),
        ("confidence.claims.domain", ">=", 0.1),
        ("grpo.probe.recovered", ">=", 0.1),
        ("shuffled.probe.difference", ">=", 0.1),
        ("grpo-sft.probe.difference", ">=", 0.1),
        ("grpo.claims.recovered", ">=", 0.1),
    ],
)
def test_a_gate_that_names_no_figure_is_refused_before_any_work(gate: tuple) -> None:
    with pytest.raises(ValueError, match="gate: got"):
        check_gates([gate])


def test_the_gates_of_every_preset_name_figures() -> None:
    for make in PRESETS.values():
        check_gates(make().evaluation.gates)


# Tables -------------------------------------------------------------------------------------------


def test_markdown_holds_every_table_and_keeps_texts_inside_their_fences(summary: dict) -> None:
    selection = {
        "sft": {"best_step": 12, "eval_loss": 0.5},
        "grpo": {"published_step": 40, "published": {"monitor/judge_centred_cosine": 0.67}},
        "linear_scorer": {"penalty": 0.01},
    }
    tried = [
        {
            "changed": "no KL",
            "kept": "no",
            "n": 621,
            "minus_sft": {"judge": {"value": -0.0123, "low": -0.02, "high": -0.004}},
        }
    ]
    report = {
        **summary,
        "preset": "tiny",
        "split": "test",
        "selection": selection,
        "experiments": tried,
        "growth": {
            "labels": {
                "judge": [{"at": 739, "top1_2way": {"value": 0.8125, "low": 0.75, "high": 0.875}}]
            }
        },
        "notes": ["a note"],
        "resamples": 300,
        "documents_left_out": 17,
        "base": {
            "name": "b",
            "digest": "d" * 32,
            "layer": 1,
            "num_layers": 3,
            "d_model": 8,
            "injection_norm": 4.0,
        },
        "lineage": {
            "sft": {
                "fingerprint": "f",
                "config_hash": "c",
                "created": "t",
                "documents": {"train": 3},
            }
        },
        "examples": [
            {
                "activation_id": "x",
                "domain": "licence",
                "text": "```\nfenced\n```",
                "descriptions": {"sft": "- a"},
            }
        ],
    }
    markdown = to_markdown(json.loads(json.dumps(report)))
    for title in (
        "## Gates",
        "## Under the reward scorer",
        "## Under the judge scorer",
        "## Paired differences",
        "## What the descriptions claim",
        "## By domain",
        "## Agreement",
        "## Lineage",
        "## Example 1",
        "## Definitions",
    ):
        assert title in markdown
    assert (
        "| sft | 12 | eval_loss 0.5 |\n| grpo | 40 | monitor/judge_centred_cosine 0.67 |\n|"
        " linear_scorer | - | penalty 0.01 |" in markdown
    )
    assert "| no KL | -0.012 [-0.020, -0.004] | 621 | 1 | – | no |" in markdown
    assert (
        "| of | labels | 2-way centred |" in markdown
        and "| judge | 739 | 0.812 [0.750, 0.875] |" in markdown
    )
    assert "pretrained on: 17\n" in markdown and "- a note\n" in markdown
    assert "````text\n```\nfenced\n```\n````" in markdown
    assert f"| sft | {interval(summary['results']['sft']['judge']['top1'])} |" in markdown


# The stage on a real run --------------------------------------------------------------------------


@pytest.fixture
def copied_run(published_run: RunConfig, tmp_path: Path) -> Callable[..., Run]:
    """Copies of a run that is ready to be evaluated.

    `copied_run("name", evaluation=EvaluationConfig(...))`
    """

    def copy(name: str = "copy", **sections: object) -> Run:
        shutil.copytree(published_run.run_dir, tmp_path / name)
        return Run(dataclasses.replace(published_run, run_dir=str(tmp_path / name), **sections))

    return copy


def change_documents(run: Run, name: str, documents: dict[str, list[str]]) -> None:
    manifest = dataclasses.replace(run.find(name), documents=documents)
    (run.root / name / "manifest.json").write_text(manifest.to_json())


def test_the_stage_publishes_a_report_on_test_documents_and_is_skipped_when_complete(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    manifest = evaluate(run)
    report = read_report(run)
    assert list(report["results"]) == [
        "gold",
        "source_text",
        "source_summary",
        "nearest_train_label",
        "sft",
        "grpo",
        "linear_probe",
        "linear_label",
        "shuffled",
        "generic",
        "mean_activation",
        "random_vector",
    ]
    assert (report["n"], report["documents"]) == (28, 14)
    assert len(manifest.documents["test"]) == 14
    assert set(manifest.parents) == {
        "corpus",
        "activations",
        "labels",
        "reward_scorer",
        "judge_scorer",
        "linear_scorer",
        "sft",
        "grpo",
    }
    _, *lines = (
        (Path(run.config.run_dir) / "report/descriptions/mean_activation.jsonl")
        .read_text()
        .splitlines()
    )
    assert len({json.loads(line)["description"] for line in lines}) == 1 and len(lines) == 28
    assert report["claims"]["generic"]["distinct"]["value"] == pytest.approx(1 / 28, abs=1e-6)
    assert evaluate(run) == manifest


def test_what_a_reader_wrote_down_becomes_notes_of_a_report_made_anew_from_the_same_descriptions(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    evaluate(run)
    folder = Path(run.config.run_dir)
    first, written = read_report(run), (folder / "report/descriptions/sft.jsonl").stat().st_mtime_ns
    assert first["notes"] == []
    (folder / "notes.txt").write_text("Licences are read well.\n\n  Numbers are invented. \n")
    manifest = evaluate(run)
    assert read_report(run) == {
        **first,
        "notes": ["Licences are read well.", "Numbers are invented."],
    }
    assert (folder / "report/descriptions/sft.jsonl").stat().st_mtime_ns == written
    assert (
        "Numbers are invented." in (folder / "report/report.md").read_text()
        and evaluate(run) == manifest
    )


def test_other_gates_make_a_report_anew_from_the_same_descriptions(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    evaluate(run)
    first, file = read_report(run), Path(run.config.run_dir) / "report/descriptions/sft.jsonl"
    written, gate = file.stat().st_mtime_ns, ("gold.claims.empty", "<=", 0.5)
    evaluation = dataclasses.replace(run.config.evaluation, gates=(gate,))
    gated = Run(dataclasses.replace(run.config, evaluation=evaluation))
    manifest = evaluate(gated)
    [judged] = read_report(gated)["gates"]
    assert judged["name"] == gate[0] and judged["passed"]
    assert read_report(gated) == {**first, "gates": [judged]}
    assert file.stat().st_mtime_ns == written and evaluate(gated) == manifest


def test_growth_is_told_along_labels_steps_and_layers(copied_run: Callable[..., Run]) -> None:
    fewer = copied_run("fewer")
    manifest = fewer.find("sft")
    change = {
        "config": {
            **manifest.config,
            "sft": {**manifest.config["sft"], "max_examples": 7, "name": "few"},
        }
    }
    (fewer.root / "sft" / "manifest.json").write_text(
        dataclasses.replace(manifest, metrics={"examples": 7}, **change).to_json()
    )
    run = copied_run("run", compare=(f"few={fewer.root.path}/sft",))
    (run.root / "sft" / "manifest.json").write_text(
        dataclasses.replace(manifest, metrics={"examples": 14}).to_json()
    )
    ceiling = {"centred_cosine": {"value": 0.4, "low": 0.3, "high": 0.5}}
    (run.root / "inspection.json").write_text(
        json.dumps(
            {
                "format": 2,
                "base": run.config.base.model,
                "layers": {"0": {"ceiling": ceiling}, "1": {"ceiling": ceiling}},
            }
        )
    )
    make_report(run.config)
    report = read_report(run)
    assert [
        (point["at"], point["top1_10way"]) for point in report["growth"]["labels"]["judge"]
    ] == [
        (7, report["results"]["few"]["judge"]["top1_10way"]),
        (14, report["results"]["sft"]["judge"]["top1_10way"]),
    ]
    assert report["growth"]["layers"] == {"gold": [{"at": 0, **ceiling}, {"at": 1, **ceiling}]}
    (run.root / "inspection.json").write_text(
        json.dumps({"base": run.config.base.model, "layers": {"0": {"ceiling": {"top1": 0.5}}}})
    )  # as it was once
    change["config"]["sft"]["learning_rate"] = (
        1.0  # differs by more than its size: no point of this curve
    )
    (fewer.root / "sft" / "manifest.json").write_text(
        dataclasses.replace(manifest, metrics={"examples": 7}, **change).to_json()
    )
    (run.root / "report_few").delete()
    make_report(run.config)
    assert read_report(run)["growth"] == {}


def test_the_monitors_readings_are_told_by_step() -> None:
    reading = {
        f"monitor/{name}{end}": 0.5
        for name in ("judge_centred_cosine", "reward_centred_cosine")
        for end in ("", "_low", "_high")
    }
    records = [
        {"step": 0, **reading, "monitor/claim_precision": 0.25},
        {"step": 1, "loss": 0.1},
        {"step": 2, **reading},
    ]
    sft = Manifest(
        name="sft",
        config={},
        config_hash="",
        parents={},
        files={},
        documents={},
        model={},
        metrics={"examples": 3},
        environment={},
        created="",
    )
    curves = growth(
        {"sft": {}}, {"sft": sft}, [], {"grpo": records, "sft": [{"step": 3, "loss": 1.0}]}, None
    )
    interval = {"value": 0.5, "low": 0.5, "high": 0.5}
    assert curves == {
        "steps": {
            "grpo": [
                {
                    "at": 0,
                    "judge_centred_cosine": interval,
                    "reward_centred_cosine": interval,
                    "claim_precision": {"value": 0.25},
                },
                {"at": 2, "judge_centred_cosine": interval, "reward_centred_cosine": interval},
            ]
        }
    }


def test_an_interrupted_report_reuses_the_descriptions_it_has_and_ends_the_same(
    copied_run: Callable[..., Run],
) -> None:
    undisturbed, interrupted = copied_run("a"), copied_run("b")
    make_report(undisturbed.config)
    done = Path(undisturbed.config.run_dir) / "report/descriptions"
    begun = Path(interrupted.config.run_dir) / "report/descriptions"
    begun.mkdir(parents=True)
    shutil.copy(done / "sft.jsonl", begun)
    lines = (done / "grpo.jsonl").read_text().splitlines(keepends=True)
    (begun / "grpo.jsonl").write_text("".join(lines[:5]) + lines[5][:10])
    samples = (done / "grpo_samples.jsonl").read_text()
    # the protocol, eight samples of an activation, five of the next
    (begun / "grpo_samples.jsonl").write_text("".join(samples.splitlines(keepends=True)[:14]))
    written = (begun / "sft.jsonl").stat().st_mtime_ns
    make_report(interrupted.config)
    assert (begun / "sft.jsonl").stat().st_mtime_ns == written
    assert (begun / "grpo.jsonl").read_text() == "".join(lines)
    assert (begun / "grpo_samples.jsonl").read_text() == samples
    assert read_report(interrupted) == read_report(undisturbed)


def test_descriptions_of_other_activations_are_not_taken_for_these(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    file = Path(run.config.run_dir) / "report/descriptions/sft.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(
        json.dumps(
            {"activation_id": "other@1:2", "description": "", "closed": True, "num_tokens": 0}
        )
        + "\n"
    )
    with pytest.raises(ValueError, match="descriptions of other activations"):
        make_report(run.config)


def test_a_test_document_that_an_ancestor_learned_from_stops_the_report(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    learned = run.find("sft").documents["train"]
    leaked = next(doc_id for doc_id in evaluated_documents(run) if doc_id not in learned)
    change_documents(run, "sft", {"train": [*learned, leaked]})
    with pytest.raises(
        ValueError, match="lineage: 1 documents of the report were in the train documents of sft"
    ):
        make_report(run.config)
    change_documents(run, "sft", {"train": learned, "validation": [leaked]})
    with pytest.raises(ValueError, match="validation documents of sft"):
        make_report(run.config)


def test_documents_that_share_text_count_as_one_and_never_stand_on_both_sides(
    copied_run: Callable[..., Run],
) -> None:
    leaked = copied_run("leaked")
    documents = sorted(set(evaluated_documents(leaked)))
    learned = leaked.find("sft").documents["train"][0]
    join_families(leaked, {documents[0]: learned, learned: learned})
    with pytest.raises(ValueError, match=r"in the train documents of corpus: \['doc.*shares text"):
        make_report(leaked.config)
    run = copied_run(evaluation=EvaluationConfig(min_documents=13, bootstrap_resamples=50))
    join_families(run, dict.fromkeys(documents[:2], documents[0]))
    make_report(run.config)
    report = read_report(run)
    assert (report["n"], report["documents"], report["families"]) == (28, 14, 13)
    assert report["results"]["sft"]["judge"]["top1"]["families"] == 13
    assert "28 activations of 14 test documents in 13 families" in " ".join(opening(report))
    strict = copied_run("strict", evaluation=EvaluationConfig(min_documents=14))
    check_corpus(strict)
    join_families(strict, dict.fromkeys(documents[:2], documents[0]))
    with pytest.raises(ValueError, match="that share no text: got 13, expected at least 14"):
        check_corpus(strict)


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        ({}, "each document, since the corpus was made before"),
        (
            {
                "joined_documents": 1_712,
                "joined_families": 122,
                "largest_family": 90,
                "held_out_in_train": {"validation": 2, "test": 0},
            },
            "1,712 documents that share text are joined in 122, each in one split; held-out texts"
            " of which half or more is in train texts: 2 of validation, 0 of test",
        ),
    ],
)
def test_a_report_says_what_was_joined(corpus: dict, sentence: str) -> None:
    lines = opening({**minimal_report(), "corpus": corpus})
    assert any(line.startswith("Families: ") and sentence in line for line in lines)


def test_a_test_document_that_the_base_was_pretrained_on_stops_the_report(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    card = Path(run.config.base.model) / "card.json"
    try:
        card.write_text(
            json.dumps(
                {"doc_id_digests": [digest(evaluated_documents(run)[0])], "twin_digests": []}
            )
        )
        with pytest.raises(ValueError, match="the base model was pretrained on"):
            make_report(run.config)
        with pytest.raises(
            ValueError, match=r"Leave --corpus.test-share"
        ):  # and before anything is trained
            check_corpus(run)
    finally:
        card.unlink()


def test_a_test_document_that_nearly_repeats_one_of_the_bases_is_left_out_and_counted(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    documents = evaluated_documents(run)
    card = Path(run.config.base.model) / "card.json"
    try:
        card.write_text(json.dumps({"doc_id_digests": [], "twin_digests": [digest(documents[0])]}))
        make_report(run.config)
    finally:
        card.unlink()
    report = read_report(run)
    assert report["documents"] == len(set(documents)) - 1 and report["documents_left_out"] == 1
    assert documents[0] not in run.find("report").documents["test"]


def evaluated_documents(run: Run) -> list[str]:
    return load_activations(run, "test").doc_ids


def test_scorers_that_share_a_document_stop_the_report(copied_run: Callable[..., Run]) -> None:
    run = copied_run()
    change_documents(run, "judge_scorer", run.find("reward_scorer").documents)
    with pytest.raises(ValueError, match=r"share .* train documents"):
        make_report(run.config)


def test_too_few_test_documents_are_an_error_and_not_a_smaller_report(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run(evaluation=EvaluationConfig(min_documents=15))
    with pytest.raises(ValueError, match="got 14, expected at least 15"):
        make_report(run.config)
    few = copied_run("few", evaluation=EvaluationConfig(min_documents=10, max_activations=9))
    with pytest.raises(ValueError, match="expected at least 10"):
        make_report(few.config)
    # and already where nothing but the corpus is there
    for small, documents in ((run, 15), (few, 10)):
        with pytest.raises(ValueError, match=f"expected at least {documents}"):
            check_corpus(small)
    check_corpus(copied_run("enough"))


def test_a_missing_artifact_names_its_job(copied_run: Callable[..., Run]) -> None:
    run = copied_run()
    (run.root / "judge_scorer").delete()
    with pytest.raises(ValueError, match=r"'judge_scorer'.*jobs/sft\.py"):
        evaluate(run)


def test_the_ablation_arm_has_a_report_of_its_own_that_shows_both(
    copied_run: Callable[..., Run], published_run: RunConfig
) -> None:
    from tiny_artifacts import publish_verbalizer

    grpo = dataclasses.replace(published_run.grpo, contrast="none")
    run = copied_run(grpo=grpo)
    publish_verbalizer(run, "grpo_no_contrast", seed=7)
    make_report(run.config)
    report = read_report(run)
    assert {"grpo", "grpo_no_contrast"} <= set(
        report["results"]
    ) and "grpo-grpo_no_contrast" in report["paired"]
    assert run.find("report") is None and run.find("report_no_contrast") is not None


def test_a_report_on_more_describes_only_what_the_runs_own_report_does_not(
    copied_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_artifacts import publish_verbalizer

    theirs, run = copied_run("theirs"), copied_run("ours")
    publish_verbalizer(run, "grpo_no_contrast", seed=7)
    make_report(run.config)
    calls, describe = [], describing.Verbalizer.describe
    monkeypatch.setattr(
        describing.Verbalizer,
        "describe",
        lambda *given, **named: calls.append(1) or describe(*given, **named),
    )

    def calls_of(name: str, **changes: object) -> int:
        calls.clear()
        make_report(
            dataclasses.replace(run.config, compare=(f"{name}={theirs.root.path}/sft",), **changes)
        )
        return len(calls)

    descriptions = run.root / "report/descriptions"
    assert (
        calls_of(
            "other", evaluation=dataclasses.replace(run.config.evaluation, bootstrap_resamples=50)
        )
        == 1
    )
    assert (run.root / "report_other/descriptions/grpo_samples.jsonl").read_bytes() == (
        descriptions / "grpo_samples.jsonl"
    ).read_bytes()
    assert (
        calls_of("arm", grpo=dataclasses.replace(run.config.grpo, contrast="none")) == 3
    )  # the arm, its samples, the other one
    assert (run.root / "report_no_contrast_arm/descriptions/grpo.jsonl").read_bytes() == (
        descriptions / "grpo.jsonl"
    ).read_bytes()
    assert calls_of("seed", evaluation=dataclasses.replace(run.config.evaluation, seed=5)) > 3


def test_descriptions_are_decoded_as_grpo_sampled_whatever_the_command_line_says(
    copied_run: Callable[..., Run],
) -> None:
    run, changed = (
        copied_run("as_trained"),
        copied_run("changed", grpo=GRPOSettings(max_new_tokens=3, temperature=0.1)),
    )
    make_report(run.config)
    make_report(changed.config)
    assert read_report(changed) == read_report(run)


def test_a_failed_gate_ends_with_a_status_only_when_asked(
    copied_run: Callable[..., Run], capsys: pytest.CaptureFixture
) -> None:
    gates = (("gold.claims.domain", ">=", 0.9), ("grpo.claims.precision", ">=", 0.9))
    run = copied_run(
        evaluation=EvaluationConfig(min_documents=10, bootstrap_resamples=50, gates=gates)
    )
    make_report(run.config)
    show_report(run)
    shown = capsys.readouterr().out
    assert "report.md" in shown and "PASS" in shown and "FAIL" in shown
    with pytest.raises(SystemExit, match=r"1 of 2 gates failed: grpo.claims.precision"):
        show_report(Run(dataclasses.replace(run.config, gate=True)))


def test_a_report_can_be_made_on_an_object_store(
    copied_run: Callable[..., Run], published_run: RunConfig
) -> None:
    local = copied_run()
    uri = f"memory://evaluated-{Path(local.config.run_dir).parent.name}"
    for path in local.root.list_files():
        (Location.of(uri) / path).write_bytes((local.root / path).read_bytes())
    remote = Run(dataclasses.replace(local.config, run_dir=uri))
    make_report(remote.config)
    make_report(local.config)
    assert read_report(remote) == read_report(local)


# Other verbalizers, other splits, broken ancestors ------------------------------------------------


def test_named_descriptions_and_adapters_stand_beside_the_runs_own(
    copied_run: Callable[..., Run], published_run: RunConfig, tmp_path: Path
) -> None:
    ids = load_activations(Run(published_run), "test").ids
    file = tmp_path / "other.jsonl"
    rows = [
        {"activation_id": activation_id, "description": f"- a licence\u2028{activation_id}"}
        for activation_id in ids[1:]
    ]  # a line separator ends no row, a blank line is none
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8"
    )
    other_run = copied_run("theirs")
    run = copied_run("ours", compare=(f"other={file}", f"theirs={other_run.root.path}/grpo"))
    make_report(run.config)
    assert run.find("report") is None
    report = read_report(run)
    assert list(report["results"])[-2:] == ["other", "theirs"]
    assert (
        report["results"]["theirs"] == report["results"]["grpo"]
        and report["paired"]["theirs-grpo"]["judge"]["delta"]["value"] == 0.0
    )
    assert report["claims"]["other"]["empty"]["value"] == pytest.approx(1 / len(ids), abs=1e-6)
    assert report["notes"] == [
        "other: nothing is known of what it was trained on; test documents may be among it.",
        (
            f"other: 1 of {len(ids)} activations have no description in other.jsonl; they count as"
            " described by nothing."
        ),
        "other: how it was generated is not recorded, so it is in no paired difference.",
    ]
    assert [pair for pair in report["paired"] if "other" in pair] == []
    file.write_text(
        file.read_text(encoding="utf-8").replace("a licence", "another licence"), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"made with another configuration .*inputs.other"):
        evaluate(run)


def test_a_file_of_another_generation_protocol_is_refused_before_anything_is_made(
    copied_run: Callable[..., Run], tmp_path: Path
) -> None:
    theirs, file = copied_run("theirs"), tmp_path / "other.jsonl"
    make_report(theirs.config)
    written = (theirs.root / "report/descriptions/grpo.jsonl").read_text()
    file.write_text(written)
    run = copied_run("ours", compare=(f"other={file}",))
    check_corpus(run)
    make_report(run.config)
    report = read_report(run)
    assert report["paired"]["other-grpo"]["judge"]["delta"]["value"] == 0.0
    assert report["protocols"]["other"] == report["protocols"]["grpo"]
    first, *lines = written.splitlines()
    protocol = GenerationProtocol.from_record(json.loads(first)["protocol"], "grpo")
    longer = dataclasses.replace(protocol, limits={"max_new_tokens": 999})
    file.write_text("\n".join([json.dumps({"protocol": longer.to_record()}), *lines]))
    for refused in (check_corpus, lambda run: make_report(run.config)):
        (run.root / "report_other").delete()
        with pytest.raises(ValueError, match=r"comparison of other .*max_new_tokens: there 999"):
            refused(run)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"activation_id": "x", "description": "a"}'], "none of one of the 28 test activations"),
        (['{"activation_id": "x"}'], "line 1: got"),
        (["no json"], "line 1: got"),
        (['{"activation_id": "x", "description": 3}'], "line 1: got"),
        (['{"activation_id": "x", "description": "a"}'] * 2, "line 2: got"),
        ([], "got 0 descriptions"),
    ],
)
def test_a_file_that_holds_no_descriptions_of_these_activations_is_refused(
    copied_run: Callable[..., Run], tmp_path: Path, lines: list[str], message: str
) -> None:
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        make_report(copied_run(compare=(f"other={tmp_path}/other.jsonl",)).config)


@pytest.mark.parametrize(
    "argument",
    ["other", "gold=/x", "grpo=/x", "Other=/x", "other=", "other=/no/such/path", "other=/tmp"],
)
def test_a_comparison_with_nothing_is_refused_before_any_work(
    copied_run: Callable[..., Run], argument: str
) -> None:
    with pytest.raises(ValueError, match="--compare"):
        evaluate(copied_run(compare=(argument,)))


def test_an_adapter_that_learned_from_test_documents_or_for_another_layer_is_refused(
    copied_run: Callable[..., Run],
) -> None:
    theirs = copied_run("theirs")
    run = copied_run("ours", compare=(f"theirs={theirs.root.path}/sft",))
    manifest = theirs.find("sft")
    change_documents(theirs, "sft", {"train": [evaluated_documents(run)[0]]})
    with pytest.raises(ValueError, match="documents of theirs"):
        make_report(run.config)
    elsewhere = dataclasses.replace(manifest, model={**manifest.model, "layer": 0})
    (theirs.root / "sft" / "manifest.json").write_text(elsewhere.to_json())
    (run.root / "report_theirs").delete()
    with pytest.raises(ValueError, match=r"got layer 1 of .*, expected 0"):
        make_report(run.config)


@pytest.mark.parametrize("scorer", ["reward_scorer", "judge_scorer", "linear_scorer"])
def test_a_scorer_of_another_base_or_layer_stops_the_report(
    copied_run: Callable[..., Run], scorer: str
) -> None:
    run = copied_run()
    manifest = run.find(scorer)
    for field, value in (("layer", 0), ("digest", "another"), ("tokenizer_digest", "another")):
        (run.root / scorer / "manifest.json").write_text(
            dataclasses.replace(manifest, model={**manifest.model, field: value}).to_json()
        )
        (run.root / "report").delete()
        with pytest.raises(
            ValueError,
            match=f"artifact '{scorer}': got (layer|weights|tokenizer) .*with which it was made",
        ):
            make_report(run.config)


def test_the_linear_scorer_may_share_no_document_with_the_reward_scorer(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    change_documents(run, "linear_scorer", run.find("reward_scorer").documents)
    with pytest.raises(ValueError, match="reward_scorer and linear_scorer share"):
        make_report(run.config)


def test_activations_that_were_put_in_another_order_are_refused_by_name(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run()
    file = (
        Path(run.config.run_dir)
        / "activations"
        / next(name for name in run.find("activations").files if name.endswith(".parquet"))
    )
    table = pq.read_table(file)
    vectors = table["activation"].take(list(range(len(table)))[::-1])
    pq.write_table(
        table.set_column(
            table.schema.get_field_index("activation"), table.schema.field("activation"), vectors
        ),
        file,
    )
    with pytest.raises(ValueError, match=f"{file.name}: got .*The file is damaged"):
        make_report(run.config)


def test_a_report_on_validation_has_a_name_of_its_own_and_says_that_it_is_no_evidence(
    copied_run: Callable[..., Run],
) -> None:
    run = copied_run(
        evaluation=dataclasses.replace(
            EvaluationConfig(),
            min_documents=5,
            bootstrap_resamples=50,
            split="validation",
            samples=0,
        )
    )
    make_report(run.config)
    report = read_report(run)
    assert (
        run.find("report") is None and report["split"] == "validation" and "best_of" not in report
    )
    assert set(run.find("report_validation").documents) == {"validation"}
    assert (
        "so this is no evidence"
        in (Path(run.config.run_dir) / "report_validation" / "report.md").read_text()
    )


def test_what_the_scorers_have_read_is_not_read_again(
    copied_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied_run()
    make_report(run.config)
    again = copied_run("again")
    # The readings of an interrupted report: as after a kill between reading and publishing.
    monkeypatch.setattr(
        "nla_ray.report.stage.to_html", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make_report(again.config)
    monkeypatch.undo()
    assert {
        file.name.partition("-")[0]
        for file in (Path(again.config.run_dir) / "report" / "scratch").iterdir()
    } == {"reward", "judge", "linear", "patched"}
    monkeypatch.setattr(
        "nla_ray.report.readings._load", lambda *arguments: pytest.fail("read again")
    )
    monkeypatch.setattr(
        "nla_ray.report.patch_back.Patcher", lambda *arguments: pytest.fail("patched again")
    )
    make_report(again.config)
    assert read_report(again) == read_report(run)
    assert not any(path.startswith("scratch") for path in again.find("report").files)


def test_every_score_is_in_the_table_and_on_the_page(copied_run: Callable[..., Run]) -> None:
    run = copied_run()
    make_report(run.config)
    report, folder = read_report(run), Path(run.config.run_dir) / "report"
    scores = pq.read_table(folder / "scores.parquet").to_pylist()
    assert len(scores) == 28 * len(report["results"]) * 3
    judged = [row for row in scores if (row["verbalizer"], row["scorer"]) == ("grpo", "judge")]
    assert sum(row["top1_2way"] for row in judged) / 28 == pytest.approx(
        report["results"]["grpo"]["judge"]["top1_2way"]["value"], abs=1e-5
    )
    assert sum(row["centred_cosine"] for row in judged) / 28 == pytest.approx(
        report["results"]["grpo"]["judge"]["centred_cosine"]["value"], abs=1e-5
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert json.dumps(report["results"]["grpo"]["judge"]["top1"]["value"]) in page
