"""The last stage: what is the verbalizer worth, on test documents it and its scorers never met.

gather ancestors -> check lineage -> describe (every verbalizer and control) -> read (every scorer)
-> summarise -> report.json, report.md, report.html, scores.parquet. Resumable description by
description. Protects two rules: nothing is computed before the manifests of all ancestors prove
that no test document was learned from or chosen on, and no description is dropped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations, load_stats
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_tokenizer
from nla_ray.base.pretrained import check_never_seen, never_nearly_seen
from nla_ray.base.sources import base_folder
from nla_ray.cluster.resources import run_placed
from nla_ray.description.record import Description
from nla_ray.report.compared import Compared, check_compared, find_compared, read_descriptions
from nla_ray.report.controls import INJECTED, SCORERS, TRAINED, VERBALIZERS, trained_in
from nla_ray.report.describing import decoding, describe_all
from nla_ray.report.experiments import experiments
from nla_ray.report.gates import check_gates
from nla_ray.report.growth import growth
from nla_ray.report.readings import read_texts
from nla_ray.report.rendering.page import to_html
from nla_ray.report.rendering.tables import print_report, to_markdown
from nla_ray.report.summary import (
    CLAIM_FIGURES,
    CONFIDENCE_METRICS,
    PREFIX_TOKENS,
    Evaluated,
    pairs_of,
    summarise,
    texts_to_read,
)
from nla_ray.run.artifact import Run, Stage, differences
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest, check_disjoint, check_lineage
from nla_ray.run.metrics import METRICS_NAME
from nla_ray.run.stages import INSPECTION_FORMAT, INSPECTION_NAME
from nla_ray.score import claims
from nla_ray.score.metrics import Comparisons
from nla_ray.settings.config import EvaluationConfig, RunConfig, to_dict
from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.text.words import WordStatistics, salient_words

logger = get_logger(__name__)


NOTES_NAME = "notes.txt"
"""In the run's folder: what someone who read the descriptions wrote down, a note a line. Every
report of the run shows it."""
PREFIX_ROWS = 400
"""Activations, chosen by seed, whose descriptions are also read in part."""
SALIENT_WORDS = 12
"""Words of a text that its description might be expected to name."""


def evaluate(run: Run) -> Manifest:
    """The report of a run. The work is done by one Ray process that is placed like a scorer, when
    Ray is there.

    Raises ValueError for a missing artifact, too few test documents, a test document that was
    trained on, or a gate that names no figure.
    """
    stage = _open_stage(run)
    if stage.manifest is not None and stage.manifest.metrics.get(
        "readers_notes", []
    ) == _readers_notes(run):
        logger.info("%s: complete, skipped", stage.name)
        return stage.manifest
    _check_gates(run.config.evaluation)
    if stage.manifest is not None:
        logger.info(
            "%s: %s has changed; made anew from the same descriptions",
            stage.name,
            run.root / NOTES_NAME,
        )
        for path in stage.manifest.files:
            run.verified(stage.name, stage.manifest, path)
        stage.reopen()
    run_placed(run.config, "scorer", make_report)
    return run.require(stage.name)


def _open_stage(run: Run) -> Stage:
    compared = {one.name: one.digest for one in _compared(run.config)}
    return run.open("report", parents=ancestors(run), inputs=compared)


def _compared(config: RunConfig) -> list[Compared]:
    return find_compared(
        config.compare, [*VERBALIZERS, config.grpo.artifact, f"{config.grpo.artifact}_samples"]
    )


def ancestors(run: Run) -> dict[str, Manifest]:
    """Manifests of everything the report is made from; of another arm the contrastive one too, where
    it is complete. Raises ValueError that names the job of what is missing."""
    manifests = run.parents_of("report")
    if run.config.grpo.contrast == "none" and (contrastive := run.find("grpo")) is not None:
        arm = run.config.grpo.artifact
        manifests = {**manifests, "grpo": contrastive, arm: manifests[arm]}
    return manifests


def make_report(config: RunConfig) -> None:
    """Everything between the ancestors and the published report, in this process."""
    # Alone on its machine: as many threads as all trainers have together.
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run = Run(config)
    stage, manifests, compared = _open_stage(run), ancestors(run), _compared(config)
    check_ancestors(run, manifests, compared)
    test, left_out = load_test(run, manifests, compared)
    settings = config.evaluation
    with stage.local_folder() as folder:
        _take_over(run, stage, manifests, folder)
        evaluated = gather(run, manifests, test, compared, folder)
        summary = summarise(evaluated, settings.gates, settings.bootstrap_resamples, settings.seed)
        notes, training = _readers_notes(run), training_records(run, manifests)
        report = {
            **_card(config, manifests, compared),
            "documents_left_out": left_out,
            "notes": [*_notes(evaluated, test, compared), *notes],
            **summary,
            "growth": growth(summary["results"], manifests, compared, training, _inspection(run)),
            "examples": _examples(evaluated, test, settings),
        }
        report = _rounded(report)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
        (folder / "report.html").write_text(
            to_html(report, gallery(evaluated, test), training), encoding="utf-8"
        )
        pq.write_table(score_table(evaluated, test), folder / "scores.parquet")
    passed = sum(gate["passed"] for gate in summary["gates"])
    stage.publish(
        documents={settings.split: list(test.doc_ids)},
        model=manifests["activations"].model,
        metrics={"gates_passed": passed, "gates": len(summary["gates"]), "readers_notes": notes},
    )


def _take_over(run: Run, stage: Stage, manifests: Mapping[str, Manifest], folder: Path) -> None:
    """Copy what the report on the run's own verbalizers alone, where it is complete, says of the
    same activations with the same adapters.

    So what stands beside them, another arm or whatever `--compare` names, is all that is described
    anew.
    """
    arm, here = run.config.grpo.artifact, stage.config["evaluation"]
    own = dataclasses.replace(
        run.config,
        grpo=dataclasses.replace(run.config.grpo, contrast="wrong", name=None),
        compare=(),
    ).report_artifact
    report, contrastive = run.find(own), run.find("grpo")
    if own == stage.name or report is None or contrastive is None:
        return

    def unchanged(name: str) -> bool:
        return name in manifests and manifests[name].fingerprint == report.parents[name]

    there = report.config["evaluation"]
    same_rows = unchanged("activations") and all(
        there[field] == here[field] for field in ("split", "max_activations", "seed")
    )
    same_length = (
        contrastive.fingerprint == report.parents["grpo"]
        and decoding(contrastive)["max_new_tokens"] == decoding(manifests[arm])["max_new_tokens"]
    )
    if not (same_rows and same_length):
        return
    described_by = {"sft": "sft", **dict.fromkeys(INJECTED, "sft"), "grpo": "grpo"}
    if arm == "grpo" and there["samples"] == here["samples"]:
        described_by["grpo_samples"] = "grpo"
    for name, artifact in described_by.items():
        path = f"descriptions/{name}.jsonl"
        if unchanged(artifact) and path in report.files and not (folder / path).exists():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(run.verified(own, report, path).read_bytes())


def gather(
    run: Run,
    manifests: Mapping[str, Manifest],
    test: ActivationTable,
    compared: Sequence[Compared],
    folder: Path,
) -> Evaluated:
    """All descriptions of the test activations, and what the scorers read in them."""
    config = run.config
    mean = torch.tensor(load_stats(run)["mean_direction"])
    descriptions, samples = describe_all(
        run, manifests, test, mean, folder / "descriptions", compared
    )
    ordered = {
        name: descriptions[name]
        for name in dict.fromkeys([*VERBALIZERS, *descriptions])
        if name in descriptions
    }
    prefix_rows = sorted(
        torch.randperm(
            len(test.ids), generator=torch.Generator().manual_seed(config.evaluation.seed)
        )[:PREFIX_ROWS].tolist()
    )
    prefixes = _prefixes(
        config,
        {
            name: [ordered[name][row] for row in prefix_rows]
            for name in ordered
            if name in ("gold", *trained_in(manifests))
        },
    )
    train = load_activations(run, "train")
    statistics = WordStatistics.fit(
        list(dict(zip(train.text_ids, train.texts, strict=True)).values())
    )
    return Evaluated(
        doc_ids=test.doc_ids,
        domains=test.domains,
        texts=test.texts,
        salient=[
            [word for word, _ in salient_words(text, statistics, SALIENT_WORDS)]
            for text in test.texts
        ],
        comparisons=Comparisons.draw(
            test.vectors, test.doc_ids, mean, config.evaluation.seed, test.domains
        ),
        descriptions=ordered,
        samples=samples,
        sampled=config.grpo.artifact,
        prefix_rows=prefix_rows,
        prefixes=prefixes,
        readings=read_texts(
            run, manifests, texts_to_read(ordered, samples, prefixes), folder / "scratch"
        ),
        domain_names=_domain_names(test.domains),
    )


def _prefixes(
    config: RunConfig, descriptions: Mapping[str, Sequence[Description]]
) -> dict[str, dict[int, list[str]]]:
    """Every description cut to its first tokens, by verbalizer and number of tokens."""
    tokenizer = load_tokenizer(config.base)
    cut: dict[str, dict[int, list[str]]] = {}
    for name, described in descriptions.items():
        encoded = tokenizer([one.text for one in described], add_special_tokens=False)["input_ids"]
        cut[name] = {
            length: [
                tokenizer.decode(ids[:length], skip_special_tokens=True).rstrip("\ufffd")
                for ids in encoded
            ]
            for length in PREFIX_TOKENS
        }
    return cut


def read_report(run: Run) -> dict[str, Any]:
    """The published report, verified. Raises ValueError when there is none."""
    name = run.config.report_artifact
    return json.loads(run.verified(name, run.require(name), "report.json").read_text())


def show_report(run: Run) -> None:
    """Print tables, examples and the report's place; exit with status 1 on a failed gate when the
    run is gated."""
    report = read_report(run)
    print_report(report)
    print(
        f"\nreport: {run.root / run.config.report_artifact / 'report.html'}, and report.md and"
        " report.json beside it"
    )
    failed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    if run.config.gate and failed:
        raise SystemExit(
            f"{len(failed)} of {len(report['gates'])} gates failed: {', '.join(failed)}"
        )


# What is evaluated --------------------------------------------------------------------------------


def check_ancestors(
    run: Run, manifests: Mapping[str, Manifest], compared: Sequence[Compared]
) -> None:
    """Raise ValueError when an ancestor was made with another base, or a scorer learned from the
    reward scorer's documents."""
    base = base_info(run.config.base)
    for name in (
        "activations",
        *trained_in(manifests),
        *(f"{scorer}_scorer" for scorer in SCORERS),
    ):
        check_base(manifests[name], base)
    check_compared(compared, base)
    check_disjoint(manifests["reward_scorer"], manifests["judge_scorer"])
    check_disjoint(manifests["reward_scorer"], manifests["linear_scorer"])


def load_test(
    run: Run, manifests: Mapping[str, Manifest], compared: Sequence[Compared] = ()
) -> tuple[ActivationTable, int]:
    """The split's activations (a seeded choice when `max_activations` is set), after lineage was
    checked; and how many documents were left out."""
    settings = run.config.evaluation
    test = load_activations(run, settings.split)
    # What is chosen by a report on validation is told as chosen; nothing may ever have been learned
    # from what is reported on.
    uses = ("train", "validation") if settings.split == "test" else ("train",)
    check_lineage(
        test.doc_ids,
        {**manifests, **{one.name: one.manifest for one in compared if one.manifest}},
        uses,
    )
    captured = len(set(test.doc_ids))
    test = _unknown_to_base(run, test)
    if settings.max_activations is not None and settings.max_activations < len(test.ids):
        order = torch.randperm(
            len(test.ids), generator=torch.Generator().manual_seed(settings.seed)
        )
        test = test.select(sorted(order[: settings.max_activations].tolist()))
    documents = len(set(test.doc_ids))
    _require_enough(documents, settings)
    return test, captured - documents


def check_corpus(run: Run) -> None:
    """Raise ValueError for gates that no report has, and when the corpus has fewer documents of the
    split than a report asks for, or has documents in it that the base was pretrained on: before
    anything is trained on it."""
    settings = run.config.evaluation
    _check_gates(settings)
    documents = run.require("corpus").documents
    if card := _card_of_base(run):
        check_never_seen(card, [*documents["validation"], *documents["test"]])
    most = len(documents[settings.split])
    _require_enough(min(most, settings.max_activations or most), settings)


def _check_gates(settings: EvaluationConfig) -> None:
    check_gates(settings.gates, CLAIM_FIGURES, CONFIDENCE_METRICS, pairs_of(VERBALIZERS))


def _require_enough(documents: int, settings: EvaluationConfig) -> None:
    if documents < settings.min_documents:
        raise ValueError(
            f"{settings.split} documents: got {documents}, expected at least"
            f" {settings.min_documents} (--evaluation.min-documents). Fewer make wide intervals:"
            " use more texts or a larger --corpus.test-share in another --run-dir, or ask for"
            " fewer; --evaluation.max-activations limits them too."
        )


def _unknown_to_base(run: Run, test: ActivationTable) -> ActivationTable:
    """The base is an ancestor too. Of one that was pretrained here a card names the documents; of
    others nothing is known.

    A document that it learned from is an error; one that nearly repeats such a document is left
    out.
    """
    card = _card_of_base(run)
    if not card:
        return test
    check_never_seen(card, test.doc_ids)
    kept = never_nearly_seen(card, test.doc_ids)
    if len(kept) < len(test.ids):
        logger.info(
            "report: %d of %d test activations left out: their documents nearly repeat some that"
            " the base was pretrained on",
            len(test.ids) - len(kept),
            len(test.ids),
        )
    return test.select(kept)


def _card_of_base(run: Run) -> dict[str, Any]:
    """The card of a base that was pretrained here, which names its documents; empty for any
    other."""
    path = base_folder(run.config.base.model, weights=False) / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    return card if "doc_id_digests" in card else {}


def _domain_names(domains: Sequence[str]) -> dict[str, str]:
    """The human name of every domain that is there or that a teacher may name."""
    return {**{domain: domain.replace("_", " ") for domain in domains}, **DOMAIN_NAMES}


# Writing ------------------------------------------------------------------------------------------


def _card(
    config: RunConfig, manifests: Mapping[str, Manifest], compared: Sequence[Compared]
) -> dict[str, Any]:
    """What the report is about: run, base, and the lineage of every ancestor."""
    return {
        "preset": config.preset,
        "split": config.evaluation.split,
        "base": manifests["activations"].model,
        "lineage": {
            name: {
                "fingerprint": one.fingerprint,
                "config_hash": one.config_hash,
                "created": one.created,
                "documents": {use: len(ids) for use, ids in one.documents.items()},
            }
            for name, one in manifests.items()
        },
        "selection": {
            name: one.metrics
            for name, one in manifests.items()
            if name.endswith("_scorer") or name in trained_in(manifests)
        },
        "compared": {
            one.name: {"digest": one.digest, "settings": _settings(config, one)} for one in compared
        },
        "experiments": experiments(config.preset),
        "resamples": config.evaluation.bootstrap_resamples,
    }


def _settings(config: RunConfig, one: Compared) -> list[str]:
    """By which settings of this run's a verbalizer that was named on the command line differs, as
    far as its manifest tells."""
    if one.manifest is None:
        return ["unknown"]
    theirs = one.manifest.config
    return differences(
        {name: theirs[name] for name in ("sft", "grpo") if name in theirs},
        {
            name: value
            for name, value in to_dict(config).items()
            if name in ("sft", "grpo") and name in theirs
        },
    )


def _notes(evaluated: Evaluated, test: ActivationTable, compared: Sequence[Compared]) -> list[str]:
    """What is missing: labels, and what is known or said by verbalizers that were named on the
    command line."""
    notes = []
    if unlabelled := sum(not one.text for one in evaluated.descriptions["gold"]):
        notes.append(
            f"gold: {unlabelled} of {len(test.ids)} activations have no label; they count as"
            " described by nothing, in what is shuffled too."
        )
    for one in compared:
        if one.manifest is None:
            notes.append(
                f"{one.name}: nothing is known of what it was trained on; test documents may be"
                " among it."
            )
        if not one.is_adapter and (missing := read_descriptions(one.path, test.ids)[1]):
            notes.append(
                f"{one.name}: {missing} of {len(test.ids)} activations have no description in"
                f" {one.path.name}; they count as described by nothing."
            )
    return notes


def _readers_notes(run: Run) -> list[str]:
    """The lines of NOTES_NAME, without empty ones; none where there is no such file."""
    place = run.root / NOTES_NAME
    return (
        [line.strip() for line in place.read_text().splitlines() if line.strip()]
        if place.exists()
        else []
    )


def _inspection(run: Run) -> dict[str, Any] | None:
    """What was found out about the base before training, if anyone looked."""
    place = run.root / INSPECTION_NAME
    found = json.loads(place.read_text()) if place.exists() else None
    if found is not None and (found["base"], found.get("format")) != (
        run.config.base.model,
        INSPECTION_FORMAT,
    ):
        logger.warning(
            "report: %s is of another base or of an earlier version, left out; make it again with"
            " jobs/inspect_base.py",
            place,
        )
        return None
    return found


def gallery(evaluated: Evaluated, test: ActivationTable) -> list[dict[str, Any]]:
    """One row an activation: its text, and what every verbalizer said of it, word by word and with
    its scores."""
    scores = {name: [{} for _ in test.ids] for name in evaluated.descriptions}
    for name, by_scorer in evaluated.geometry.items():
        for scorer, named in by_scorer.items():
            columns = zip(
                named["centred_cosine"].numerator.tolist(),
                named["correct_cosine"].numerator.tolist(),
                named["top1"].numerator.bool().tolist(),
                named["mrr_10way"].numerator.tolist(),
            )
            for own, (centred, cosine, top1, reciprocal_rank) in zip(scores[name], columns):
                own[scorer] = {
                    "centred_cosine": round(centred, 3),
                    "cosine": round(cosine, 3),
                    "top1": top1,
                    "rank_10way": round(1 / reciprocal_rank),
                }
    return [
        {
            "activation_id": test.ids[row],
            "doc_id": test.doc_ids[row],
            "domain": test.domains[row],
            "text": test.texts[row],
            "descriptions": {
                name: {
                    "segments": claims.marked(described[row].text, test.texts[row]),
                    "closed": described[row].closed,
                    "tokens": described[row].num_tokens,
                    "scores": scores[name][row],
                    "precision": round(
                        evaluated.claims[name]["precision"].numerator[row].item(), 3
                    ),
                }
                for name, described in evaluated.descriptions.items()
            },
        }
        for row in range(len(test.ids))
    ]


def training_records(
    run: Run, manifests: Mapping[str, Manifest]
) -> dict[str, list[dict[str, float]]]:
    """What training wrote down step by step, by artifact."""
    return {
        name: [
            json.loads(line)
            for line in run.verified(name, one, METRICS_NAME).read_text().splitlines()
        ]
        for name, one in manifests.items()
        if METRICS_NAME in one.files
    }


def score_table(evaluated: Evaluated, test: ActivationTable) -> pa.Table:
    """Cosines and choices of every description: one row an activation, verbalizer and scorer."""
    choices = [
        metric
        for metric in ("top1", "top1_2way", "top1_10way", "top1_10way_hard", "top1_100way")
        if all(
            metric in named
            for by_scorer in evaluated.geometry.values()
            for named in by_scorer.values()
        )
    ]
    columns: dict[str, list] = {
        name: []
        for name in (
            "activation_id",
            "verbalizer",
            "scorer",
            "cosine",
            "garbage_cosine",
            "centred_cosine",
            *choices,
        )
    }
    for name, by_scorer in evaluated.geometry.items():
        for scorer, named in by_scorer.items():
            columns["activation_id"] += test.ids
            columns["verbalizer"] += [name] * len(test.ids)
            columns["scorer"] += [scorer] * len(test.ids)
            columns["cosine"] += named["correct_cosine"].numerator.tolist()
            columns["garbage_cosine"] += named["garbage_cosine"].numerator.tolist()
            columns["centred_cosine"] += named["centred_cosine"].numerator.tolist()
            for choice in choices:
                columns[choice] += named[choice].numerator.bool().tolist()
    return pa.table(columns)


def _examples(
    evaluated: Evaluated, test: ActivationTable, settings: EvaluationConfig
) -> list[dict[str, Any]]:
    """Seeded test rows of different domains, not chosen by hand or by score, with every
    verbalizer's words."""
    order = torch.randperm(
        len(test.ids), generator=torch.Generator().manual_seed(settings.seed)
    ).tolist()
    chosen: dict[str, int] = {}
    for row in order:
        chosen.setdefault(test.domains[row], row)
    rows = list(chosen.values())[: settings.examples]
    shown = [
        name
        for name in evaluated.descriptions
        if name in ("gold", *TRAINED) or name not in VERBALIZERS
    ]
    return [
        {
            "activation_id": test.ids[row],
            "domain": test.domains[row],
            "text": test.texts[row],
            "descriptions": {name: evaluated.descriptions[name][row].text for name in shown},
        }
        for row in rows
    ]


def _rounded(value: Any) -> Any:
    """Floats at six digits after the point, all through a JSON value."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
