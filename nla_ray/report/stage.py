"""The last stage: what is the verbalizer worth, on test documents it and its scorers never met.

ancestors -> lineage proved -> descriptions (every verbalizer and control) -> readings (every
scorer) -> figures -> report.json, report.md, report.html, scores.parquet. Resumable description by
description. Protects two rules: nothing is computed before the manifests of all ancestors prove
that no test document was learned from or chosen on, and no description is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from nla_ray.base.identity import base_info
from nla_ray.cluster.resources import run_placed
from nla_ray.report.cards import experiments, findings, picture_name, write_card
from nla_ray.report.compared import Compared, check_compared, find_compared
from nla_ray.report.controls import CONFIDENT, TRAINED, VERBALIZERS
from nla_ray.report.describing import at_layer, check_protocols
from nla_ray.report.differences import of_first
from nla_ray.report.example import explain_examples
from nla_ray.report.gallery import examples, gallery, score_table
from nla_ray.report.gates import check_gates
from nla_ray.report.gathering import gather_evaluated
from nla_ray.report.growth import growth, read_inspection, read_training_records
from nla_ray.report.lineage import (
    ancestors,
    check_ancestors,
    check_documents,
    corpus_section,
    lineage_section,
    load_test,
)
from nla_ray.report.notes import NOTES_NAME, missing_notes, readers_notes
from nla_ray.report.pairing import protocol_records
from nla_ray.report.rendering.card import commands_of, to_card
from nla_ray.report.rendering.curves import word_chart
from nla_ray.report.rendering.markdown import to_markdown
from nla_ray.report.rendering.page import to_html
from nla_ray.report.rendering.picture import line_picture
from nla_ray.report.rendering.terminal import print_report
from nla_ray.report.reuse import OwnReport
from nla_ray.report.seeds import seed_section
from nla_ray.report.summary import summarise
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.run.recipe import with_defaults
from nla_ray.run.stages import pipeline_timings
from nla_ray.settings.config import RunConfig, to_dict
from nla_ray.settings.presets import preset

logger = get_logger(__name__)


def evaluate(run: Run) -> Manifest:
    """The report of a run, made by one Ray process that is placed like a scorer.

    A complete report is skipped, unless the readers' notes or the gates have changed: then it is
    made anew from the same descriptions. Raises ValueError for a missing artifact, too few test
    documents, a test document that was trained on, or a gate that names no figure.
    """
    stage = _open_stage(run)
    changed = _changed_since(run, stage.manifest) if stage.manifest else []
    if stage.manifest is not None and not changed:
        logger.info("%s: complete, skipped", stage.name)
        return stage.manifest
    check_gates(run.config.evaluation.gates)
    if stage.manifest is not None:
        what = " and ".join(changed)
        logger.info("%s: made anew from the same descriptions, because of %s", stage.name, what)
        for path in stage.manifest.files:
            run.verified(stage.name, stage.manifest, path)
        stage.reopen()
    run_placed(run.config, "scorer", make_report)
    return run.require(stage.name)


def _changed_since(run: Run, manifest: Manifest) -> list[str]:
    """What a complete report was made with and is now otherwise, of what shapes no description."""
    changed = []
    if manifest.metrics.get("readers_notes", []) != readers_notes(run):
        changed.append(f"another {run.root / NOTES_NAME}")
    made, wanted = manifest.config["evaluation"], to_dict(run.config)["evaluation"]
    if made["gates"] != wanted["gates"]:
        changed.append("other gates")
    if made.get("min_claim_confidence") != wanted["min_claim_confidence"]:
        changed.append("another confidence of claims")
    if made.get("differences", 0) != wanted["differences"]:
        changed.append("another number of differences")
    return changed


def check_corpus(run: Run) -> None:
    """Raise ValueError when no report can be made of the corpus, before anything is trained on it.

    Checks the gates and what is to be compared too: a wrong name would be found hours later.
    """
    check_gates(run.config.evaluation.gates)
    compared = _compared(run.config)
    check_protocols(run, compared)
    if compared:
        check_compared(compared, base_info(run.config.base))
    check_documents(run)


def make_report(config: RunConfig) -> None:
    """Everything between the ancestors and the published report, in this process."""
    # The process is alone on its machine: it takes as many threads as all trainers together.
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run, settings = Run(config), config.evaluation
    stage, manifests, compared = _open_stage(run), ancestors(run), _compared(config)
    check_ancestors(run, manifests, compared)
    test, left_out = load_test(run, manifests, compared)
    notes, training = readers_notes(run), read_training_records(run, manifests)
    with stage.local_folder() as folder:
        own_report = OwnReport(run, stage, manifests)
        evaluated = gather_evaluated(run, manifests, test, compared, folder, own_report)
        summary = summarise(evaluated, settings.gates, settings.bootstrap_resamples, settings.seed)
        inspection = read_inspection(run)
        report = _rounded(
            {
                "preset": config.preset,
                "split": settings.split,
                "base": manifests["activations"].model,
                **lineage_section(config, manifests, compared),
                "experiments": experiments(config.preset),
                "resamples": settings.bootstrap_resamples,
                "documents_left_out": left_out,
                "corpus": corpus_section(manifests["corpus"]),
                "notes": [*missing_notes(evaluated, test, compared), *notes],
                "protocols": protocol_records(evaluated.protocols),
                **summary,
                "seeds": seed_section(summary, run, manifests, compared),
                "growth": growth(summary["results"], manifests, compared, training, inspection),
                "examples": examples(evaluated, test, settings),
            }
        )
        page = to_html(report, gallery(evaluated, test), training)
        _write(folder, report, page)
        pq.write_table(score_table(evaluated, test), folder / "scores.parquet")
    gates_passed = sum(gate["passed"] for gate in report["gates"])
    stage.publish(
        documents={settings.split: list(test.doc_ids)},
        model=manifests["activations"].model,
        metrics={
            "gates_passed": gates_passed,
            "gates": len(report["gates"]),
            "readers_notes": notes,
        },
    )


def _open_stage(run: Run) -> Artifact:
    digests = {verbalizer.name: verbalizer.digest for verbalizer in _compared(run.config)}
    return run.open("report", parents=ancestors(run), inputs=digests)


def _compared(config: RunConfig) -> list[Compared]:
    arm, layers = config.grpo.artifact, config.base.further_layers
    by_layer = [at_layer(name, layer) for name in ("sft", arm) for layer in layers]
    taken = [*VERBALIZERS, arm, f"{arm}_samples", f"{arm}_{CONFIDENT}", *by_layer]
    if config.evaluation.differences:
        named = [argument.partition("=")[0] for argument in config.compare]
        taken += map(of_first, dict.fromkeys(["gold", *TRAINED, arm, *named]))
    return find_compared(config.compare, taken)


def _rounded(value: Any) -> Any:
    """Floats at six digits after the point, all through a JSON value."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _write(folder: Path, report: dict[str, Any], page: str) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")


# The published report -----------------------------------------------------------------------------


def read_report(run: Run) -> dict[str, Any]:
    """The published report, verified. Raises ValueError when there is none."""
    name = run.config.report_artifact
    return json.loads(run.verified(name, run.require(name), "report.json").read_text())


def show_report(run: Run) -> None:
    """Print the report's tables and examples, and where its files are; write the card if asked.

    Exits with status 1 when a gate failed and the run is gated.
    """
    report = read_report(run)
    print_report(report)
    print(
        f"\nreport: {run.root / run.config.report_artifact / 'report.html'}, and report.md and"
        " report.json beside it"
    )
    if run.config.card:
        print(f"card: {publish_card(run, report)}")
    failed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    if run.config.gate and failed:
        raise SystemExit(
            f"{len(failed)} of {len(report['gates'])} gates failed: {', '.join(failed)}"
        )


def publish_card(run: Run, report: Mapping[str, Any]) -> Path:
    """Write the published report as the preset's card into the package.

    Its figures are the report's; only the texts written for it are described anew. Raises
    ValueError for a report on validation, of another arm, or with verbalizers beside the run's own:
    a card is of the preset as it is.
    """
    config, name = run.config, run.config.report_artifact
    if config.compare or config.grpo.artifact != "grpo" or config.evaluation.split != "test":
        raise ValueError(
            f"--card: got the report {name!r}, expected 'report', the one on test documents of the"
            " preset's own verbalizers, or 'report_seeds'. Leave out --compare and what chooses"
            " another report."
        )
    # Of the trainings under other seeds nothing: `--seeds` names them.
    recorded: dict[str, dict[str, Any]] = {}
    for manifest in (*run.parents_of("report").values(), run.require(name)):
        recorded |= manifest.config
    recorded["corpus"] = {"families": False, **recorded["corpus"]}  # a corpus made before has none
    preset_name, chart = config.preset, word_chart(report)
    card = to_card(
        report,
        seconds=pipeline_timings(run),
        commands=commands_of(
            preset_name, with_defaults(recorded), to_dict(preset(preset_name)), config.seeds
        ),
        findings=findings(preset_name),
        examples=explain_examples(run),
        picture=picture_name(preset_name) if chart.series else "",
    )
    return write_card(preset_name, card, line_picture(chart) if chart.series else "")
