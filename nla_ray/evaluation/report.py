"""The last stage: what is the verbalizer worth, on test documents it and its scorers never met.

gather ancestors -> check lineage -> describe (every verbalizer and control) -> reconstruct (every scorer) -> summarise
-> report.json, report.md. Resumable description by description. Protects two rules: nothing is computed before the
manifests of all ancestors prove that no test document was learned from or chosen on, and no description is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_ray.activations import ActivationTable, check_base, load_activations, load_stats
from nla_ray.artifacts import Run, Stage
from nla_ray.config import EvaluationConfig, RunConfig
from nla_ray.corpus.embedded import DOMAIN_NAMES
from nla_ray.evaluation.controls import (
    INJECTED, TRAINED, VERBALIZERS, injected_vectors, label_descriptions, nearest_train_labels,
)
from nla_ray.evaluation.metrics import Comparisons
from nla_ray.evaluation.summary import SCORERS, Described, Evaluated, check_gates, summarise
from nla_ray.evaluation.tables import print_report, to_markdown
from nla_ray.labels.stage import load_labels
from nla_ray.manifest import Manifest, check_disjoint, check_lineage
from nla_ray.models.backbone import base_folder, base_info, load_backbone, load_tokenizer
from nla_ray.models.reconstructor import Reconstructor
from nla_ray.models.verbalizer import Verbalizer
from nla_ray.runlog import MetricsLog, get_logger, stage_progress
from nla_ray.training.pretrain import check_never_seen, never_nearly_seen

JOBS = {"corpus": "corpus", "activations": "capture", "labels": "label", "reward_scorer": "sft", "judge_scorer": "sft",
        "sft": "sft"}
"""What every report is made from, beside the arm of GRPO, and the job that makes it."""
_CHUNK_BATCHES = 8
"""Activations handed to the engine at once, in batches: enough that slots stay full, few enough that little is lost."""

logger = get_logger(__name__)


def evaluate(run: Run) -> Manifest:
    """The report of a run. The work is done by one Ray process that is placed like a scorer, when Ray is there.

    Raises ValueError for a missing artifact, too few test documents, a test document that was trained on, or a gate
    that names no figure.
    """
    stage = _open_stage(run)
    if stage.manifest is not None:
        logger.info("%s: complete, skipped", stage.name)
        return stage.manifest
    check_gates(run.config.evaluation.gates)
    _make_placed(run.config)
    return run.require(stage.name, "evaluate")


def _make_placed(config: RunConfig) -> None:
    import ray

    from nla_ray.cluster import demand, require_resources, worker_options

    if not ray.is_initialized():
        make_report(config)
        return
    require_resources([demand(config.compute, "scorer")])
    worker = ray.remote(make_report).options(max_retries=3, **worker_options(config.compute, "scorer"))
    ray.get(worker.remote(config))


def report_name(config: RunConfig) -> str:
    """`report`; the report that shows the ablation arm beside the other is an artifact of its own."""
    return "report" if config.grpo.contrast == "wrong" else "report_no_contrast"


def _open_stage(run: Run) -> Stage:
    return run.stage(report_name(run.config), "base", "evaluation", parents=ancestors(run))


def ancestors(run: Run) -> dict[str, Manifest]:
    """Manifests of everything the report is made from. Raises ValueError that names the job of what is missing."""
    manifests = {name: run.require(name, job) for name, job in JOBS.items()}
    if run.config.grpo.contrast == "none" and (contrastive := run.find("grpo")) is not None:
        manifests["grpo"] = contrastive
    arm = run.config.grpo.artifact
    return manifests | {arm: run.require(arm, "grpo")}


def make_report(config: RunConfig) -> None:
    """Everything between the ancestors and the published report, in this process."""
    # Alone on its machine: as many threads as all trainers have together.
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run = Run(config)
    stage, manifests = _open_stage(run), ancestors(run)
    base = base_info(config.base)
    for name in ("activations", *TRAINED, *(f"{scorer}_scorer" for scorer in SCORERS)):
        if name in manifests:
            check_base(manifests[name], base)
    test, left_out = load_test(run, manifests)
    mean = torch.tensor(load_stats(run)["mean_direction"])
    with stage.local_folder() as folder:
        descriptions = describe_all(run, manifests, test, mean, folder / "descriptions")
        evaluated = Evaluated(
            doc_ids=test.doc_ids, domains=test.domains, texts=test.texts, descriptions=descriptions,
            comparisons=Comparisons.draw(test.vectors, test.doc_ids, mean, config.evaluation.seed, test.domains),
            reconstructions=reconstruct_all(run, manifests, descriptions), domain_names=_domain_names(test.domains))
        settings = config.evaluation
        summary = summarise(evaluated, settings.gates, settings.bootstrap_resamples, settings.seed)
        report = {**_card(config, manifests), "documents_left_out": left_out, **summary, "examples": _examples(evaluated, test, settings)}
        (folder / "report.json").write_text(json.dumps(_rounded(report), indent=1) + "\n")
        (folder / "report.md").write_text(to_markdown(report))
    passed = sum(gate["passed"] for gate in summary["gates"])
    stage.publish(documents={"test": list(test.doc_ids)}, model=manifests["activations"].model,
                  metrics={"gates_passed": passed, "gates": len(summary["gates"])})


def read_report(run: Run) -> dict[str, Any]:
    """The published report, verified. Raises ValueError when there is none."""
    name = report_name(run.config)
    return json.loads(run.verified(name, run.require(name, "evaluate"), "report.json").read_text())


def show_report(run: Run) -> None:
    """Print tables, examples and the report's place; exit with status 1 on a failed gate when the run is gated."""
    report = read_report(run)
    print_report(report)
    print(f"\nreport: {run.root / report_name(run.config) / 'report.md'}")
    failed = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    if run.config.gate and failed:
        raise SystemExit(f"{len(failed)} of {len(report['gates'])} gates failed: {', '.join(failed)}")


# What is evaluated ----------------------------------------------------------------------------------------------------

def load_test(run: Run, manifests: Mapping[str, Manifest]) -> tuple[ActivationTable, int]:
    """Test activations (a seeded choice when `max_activations` is set), after lineage was checked; and how many documents were
    left out."""
    settings = run.config.evaluation
    check_disjoint(manifests["reward_scorer"], manifests["judge_scorer"])
    test = load_activations(run, "test")
    check_lineage(test.doc_ids, manifests)
    captured = len(set(test.doc_ids))
    test = _unknown_to_base(run, test)
    if settings.max_activations is not None and settings.max_activations < len(test.ids):
        order = torch.randperm(len(test.ids), generator=torch.Generator().manual_seed(settings.seed))
        test = test.select(sorted(order[:settings.max_activations].tolist()))
    documents = len(set(test.doc_ids))
    if documents < settings.min_documents:
        raise ValueError(f"test documents: got {documents}, expected at least {settings.min_documents}. Enlarge the "
                         "corpus or raise --evaluation.max-activations; fewer documents make no report.")
    return test, captured - documents


def _unknown_to_base(run: Run, test: ActivationTable) -> ActivationTable:
    """The base is an ancestor too. Of one that was pretrained here a card names the documents; of others nothing is known.

    A document that it learned from is an error; one that nearly repeats such a document is left out.
    """
    path = base_folder(run.config.base.model, weights=False) / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    if "doc_id_digests" not in card:
        return test
    check_never_seen(card, test.doc_ids)
    kept = never_nearly_seen(card, test.doc_ids)
    if len(kept) < len(test.ids):
        logger.info("report: %d of %d test activations left out: their documents nearly repeat some that the base was pretrained on",
                    len(test.ids) - len(kept), len(test.ids))
    return test.select(kept)


def _domain_names(domains: Sequence[str]) -> dict[str, str]:
    """The human name of every domain that is there or that a teacher may name."""
    return {**{domain: domain.replace("_", " ") for domain in domains}, **DOMAIN_NAMES}


# Describing -----------------------------------------------------------------------------------------------------------

def describe_all(run: Run, manifests: Mapping[str, Manifest], test: ActivationTable, mean: Tensor,
                 folder: Path) -> dict[str, list[Described]]:
    """Descriptions of every test activation by verbalizer, in report order; written to `folder` as they come."""
    folder.mkdir(parents=True, exist_ok=True)
    describer = _Describer(run.config, test, folder)
    described = {name: describer.keep(name, texts) for name, texts in _label_controls(run, test, mean).items()}
    for artifact in TRAINED:
        if artifact not in manifests:
            continue
        injected = {artifact: test.vectors}
        if artifact == "sft":
            injected |= {name: injected_vectors(name, test.ids, test.vectors, mean, run.config.evaluation.seed)
                         for name in INJECTED}
        with run.local_copy(artifact, manifests[artifact], "adapter") as adapter:
            described |= describer.describe(adapter, manifests[artifact].model["neighbours"], injected)
    return {name: described[name] for name in VERBALIZERS if name in described}


def _label_controls(run: Run, test: ActivationTable, mean: Tensor) -> dict[str, list[str]]:
    """What the controls that need no model say of every test activation."""
    gold = {row["text_id"]: row["label"] for row in load_labels(run, "test") if row["drawn"]}
    known = {row["text_id"]: row["label"] for row in load_labels(run, "train") if row["drawn"]}
    train = load_activations(run, "train")
    seed = run.config.evaluation.seed
    texts = {name: label_descriptions(name, test.text_ids, test.doc_ids, gold, seed)
             for name in ("gold", "shuffled", "generic")}
    nearest = nearest_train_labels(test.vectors, train.vectors, train.text_ids, known, mean)
    return {**texts, "nearest_train_label": nearest}


class _Describer:
    """Keeps `{verbalizer}.jsonl` files of descriptions, and makes what they lack with adapters over one loaded base."""

    def __init__(self, config: RunConfig, test: ActivationTable, folder: Path) -> None:
        self._config, self._ids, self._folder = config, test.ids, folder
        self._tokenizer, self._model = load_tokenizer(config.base), None
        self._num_tokens: dict[str, int] = {}

    def keep(self, name: str, texts: Sequence[str]) -> list[Described]:
        """Write descriptions that cost nothing to make, one for each activation."""
        described = [self._described(text, closed=True) for text in texts]
        rows = (_row(activation_id, one) for activation_id, one in zip(self._ids, described, strict=True))
        (self._folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return described

    def describe(self, adapter: Path, neighbours: Sequence[int],
                 injected: Mapping[str, Tensor]) -> dict[str, list[Described]]:
        """What one adapter says, by name of what is injected: [rows, d_model], or [1, d_model] for all rows alike."""
        logs = {name: MetricsLog(self._folder / f"{name}.jsonl") for name in injected}
        described = {name: self._read(log) for name, log in logs.items()}
        if any(len(done) < len(self._ids) for done in described.values()):
            self._model = load_backbone(self._config.base) if self._model is None else self._model
            verbalizer = Verbalizer.load(self._config.base, adapter, neighbours=neighbours, model=self._model)
            for name, vectors in injected.items():
                self._complete(verbalizer, name, vectors, described[name], logs[name])
        return described

    def _complete(self, verbalizer: Verbalizer, name: str, injected: Tensor, done: list[Described],
                  log: MetricsLog) -> None:
        """Append the missing descriptions to `done` and to the file, chunk by chunk."""
        chunk = self._config.evaluation.batch_size * _CHUNK_BATCHES
        with stage_progress(f"describe: {name}", len(self._ids)) as advance:
            advance(len(done))
            while len(done) < len(self._ids):
                start = len(done)
                rows = injected if len(injected) == 1 else injected[start:start + chunk]
                written = verbalizer.describe(rows, max_new_tokens=self._config.grpo.max_new_tokens)
                copies = len(self._ids) - start if len(injected) == 1 else 1
                fresh = [self._described(one.text, one.closed) for one in written] * copies
                for activation_id, one in zip(self._ids[start:], fresh):
                    log.append(_row(activation_id, one))
                done += fresh
                advance(len(fresh))

    def _read(self, log: MetricsLog) -> list[Described]:
        """What is there already. Raises ValueError when it describes other activations."""
        rows = log.read()
        if [row["activation_id"] for row in rows] != self._ids[:len(rows)]:
            raise ValueError(f"{log.path}: got descriptions of other activations than the test split's, expected the "
                             "same in order. The file is damaged; delete it and evaluate again.")
        return [Described(row["description"], row["closed"], row["num_tokens"]) for row in rows]

    def _described(self, text: str, closed: bool) -> Described:
        """With its length in tokens; labels and controls repeat, so each text is counted once."""
        if text not in self._num_tokens:
            self._num_tokens[text] = len(self._tokenizer.encode(text, add_special_tokens=False))
        return Described(text, closed, self._num_tokens[text])


def _row(activation_id: str, one: Described) -> dict[str, Any]:
    return {"activation_id": activation_id, "description": one.text, "closed": one.closed, "num_tokens": one.num_tokens}


# Scoring --------------------------------------------------------------------------------------------------------------

def reconstruct_all(run: Run, manifests: Mapping[str, Manifest],
                    descriptions: Mapping[str, Sequence[Described]]) -> dict[str, dict[str, Tensor]]:
    """Reconstructions by verbalizer and scorer, each [rows, d_model]. Both scorers share one loaded base.

    A description is read once by each scorer, whichever verbalizers wrote it and however often.
    """
    batch_size = run.config.evaluation.batch_size
    unique = sorted({one.text for described in descriptions.values() for one in described},
                    key=lambda text: (len(text), text))
    places = {text: place for place, text in enumerate(unique)}
    result: dict[str, dict[str, Tensor]] = {name: {} for name in descriptions}
    model = None
    with stage_progress("reconstruct", len(SCORERS) * len(unique)) as advance:
        for scorer in SCORERS:
            artifact = f"{scorer}_scorer"
            with run.local_copy(artifact, manifests[artifact]) as folder:
                reconstructor = Reconstructor.load(run.config.base, folder, adapter=scorer, model=model)
            model = reconstructor.model
            rows = []
            for start in range(0, len(unique), batch_size):
                rows.append(reconstructor.reconstruct(unique[start:start + batch_size], batch_size))
                advance(len(rows[-1]), scorer)
            read = torch.cat(rows)
            for name, described in descriptions.items():
                result[name][scorer] = read[[places[one.text] for one in described]]
    return result


# Writing --------------------------------------------------------------------------------------------------------------

def _card(config: RunConfig, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """What the report is about: run, base, and the lineage of every ancestor."""
    return {
        "preset": config.preset,
        "base": manifests["activations"].model,
        "lineage": {name: {"fingerprint": one.fingerprint, "config_hash": one.config_hash, "created": one.created,
                           "documents": {use: len(ids) for use, ids in one.documents.items()}}
                    for name, one in manifests.items()},
        "resamples": config.evaluation.bootstrap_resamples,
    }


def _examples(evaluated: Evaluated, test: ActivationTable, settings: EvaluationConfig) -> list[dict[str, Any]]:
    """Seeded test rows of different domains, not chosen by hand or by score, with every verbalizer's words."""
    order = torch.randperm(len(test.ids), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    chosen: dict[str, int] = {}
    for row in order:
        chosen.setdefault(test.domains[row], row)
    rows = list(chosen.values())[:settings.examples]
    shown = [name for name in ("gold", *TRAINED) if name in evaluated.descriptions]
    return [{"activation_id": test.ids[row], "domain": test.domains[row], "text": test.texts[row],
             "descriptions": {name: evaluated.descriptions[name][row].text for name in shown}} for row in rows]


def _rounded(value: Any) -> Any:
    """Floats at six digits after the point, all through a JSON value."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
