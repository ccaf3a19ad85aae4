"""What a report is made from, and the proof that nobody learned from what it is about.

Knows the manifests of the run; describes and computes nothing. Protects the rule of held-out
documents: no artifact may have learned from a document that the report is about (a report on test
documents asks too that nothing was chosen on them), neither may the base's own pretraining, and the
reward scorer shares no document with the scorers that judge it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.activation.bank import ActivationTable, drawn_rows
from nla_ray.activation.stage import load_activations
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.pretrained import check_never_seen, never_nearly_seen
from nla_ray.base.sources import base_folder
from nla_ray.report.compared import Compared, check_compared
from nla_ray.report.controls import REFRESHED, SCORERS, artifact_of, trained_in
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest, check_disjoint, check_lineage
from nla_ray.run.recipe import config_differences
from nla_ray.run.stages import seed_variants, stage_named
from nla_ray.settings.config import EvaluationConfig, RunConfig, to_dict
from nla_ray.text.stage import families_of, read_families

logger = get_logger(__name__)


def ancestors(run: Run) -> dict[str, Manifest]:
    """Manifests of everything the report is made from, by artifact.

    A report on another arm has the contrastive arm as well, where that is complete; a report with
    `--seeds` has GRPO under each, and SFT where that was trained. Raises ValueError when an
    artifact is missing; the message names its job.
    """
    manifests = run.parents_of("report")
    for variant in seed_variants(run.config, stage_named("grpo")):
        manifests[variant.grpo.artifact] = run.require(variant.grpo.artifact)
    for variant in seed_variants(run.config, stage_named("sft")):
        if (trained := run.find(variant.sft.artifact)) is not None:
            manifests[variant.sft.artifact] = trained
    if run.config.grpo.contrast == "none" and (contrastive := run.find("grpo")) is not None:
        arm = run.config.grpo.artifact
        manifests = {**manifests, "grpo": contrastive, arm: manifests[arm]}
    return manifests


def check_ancestors(
    run: Run, manifests: Mapping[str, Manifest], compared: Sequence[Compared]
) -> None:
    """Raise ValueError for an ancestor of another base, or for scorers that share documents."""
    base = base_info(run.config.base)
    scorers = [artifact_of(scorer) for scorer in (*SCORERS, REFRESHED)]
    present = [name for name in scorers if name in manifests]
    for name in ("activations", *trained_in(manifests), *present):
        check_base(manifests[name], base)
    check_compared(compared, base)
    for paid in ("reward", REFRESHED):
        if artifact_of(paid) in manifests:
            check_disjoint(manifests[artifact_of(paid)], manifests["judge_scorer"])
            check_disjoint(manifests[artifact_of(paid)], manifests["linear_scorer"])


def load_test(
    run: Run, manifests: Mapping[str, Manifest], compared: Sequence[Compared] = ()
) -> tuple[ActivationTable, int]:
    """The split's activations, once their lineage is proved; and how many documents are left out.

    A seeded choice of them when `max_activations` is set. Raises ValueError for a document that was
    learned from or chosen on, and for too few documents.
    """
    settings = run.config.evaluation
    test = load_activations(run, settings.split)
    # A report on validation says that artifacts were chosen there. None may have learned there.
    uses = ("train", "validation") if settings.split == "test" else ("train",)
    named = {verbalizer.name: verbalizer.manifest for verbalizer in compared if verbalizer.manifest}
    check_lineage(test.doc_ids, {**manifests, **named}, uses, read_families(run))
    captured = len(set(test.doc_ids))
    test = _unknown_to_base(run, test)
    if settings.max_activations is not None:
        test = test.select(drawn_rows(len(test), settings.max_activations, settings.seed))
    _require_enough(len(set(test.family_ids)), settings)
    return test, captured - len(set(test.doc_ids))


def check_documents(run: Run) -> None:
    """Raise ValueError when the corpus has too few documents of the split for a report.

    Also when a document of validation or test is one that the base was pretrained on.
    """
    settings = run.config.evaluation
    documents = run.require("corpus").documents
    if card := _card_of_base(run):
        check_never_seen(card, [*documents["validation"], *documents["test"]])
    most = len(set(families_of(run, documents[settings.split])))
    _require_enough(min(most, settings.max_activations or most), settings)


def _require_enough(families: int, settings: EvaluationConfig) -> None:
    if families < settings.min_documents:
        raise ValueError(
            f"{settings.split} documents that share no text: got {families}, expected at least"
            f" {settings.min_documents} (--evaluation.min-documents). Fewer make wide intervals:"
            " use more texts or a larger --corpus.test-share in another --run-dir, or ask for"
            " fewer; --evaluation.max-activations limits them too."
        )


def _unknown_to_base(run: Run, test: ActivationTable) -> ActivationTable:
    """The activations of documents that the base itself does not know.

    The base is an ancestor too. The card of a base that was pretrained here names its documents; of
    other bases nothing is known. A document that the base learned from is an error; a document that
    nearly repeats such a document is left out.
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
    """The card of a base that was pretrained here, which names its documents; else empty."""
    path = base_folder(run.config.base.model, weights=False) / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    return card if "doc_id_digests" in card else {}


def corpus_section(corpus: Manifest) -> dict[str, Any]:
    """What the report says of families; nothing of a corpus made before they were found."""
    names = ("joined_documents", "joined_families", "largest_family", "held_out_in_train")
    return {name: corpus.metrics[name] for name in names if name in corpus.metrics}


def lineage_section(
    config: RunConfig, manifests: Mapping[str, Manifest], compared: Sequence[Compared]
) -> dict[str, Any]:
    """What the report says of its ancestors, and of the verbalizers named on the command line."""
    lineage = {
        name: {
            "fingerprint": manifest.fingerprint,
            "config_hash": manifest.config_hash,
            "created": manifest.created,
            "documents": {use: len(ids) for use, ids in manifest.documents.items()},
        }
        for name, manifest in manifests.items()
    }
    selection = {
        name: manifest.metrics
        for name, manifest in manifests.items()
        if "_scorer" in name or name in trained_in(manifests)
    }
    named = {
        verbalizer.name: {"digest": verbalizer.digest, "settings": _settings(config, verbalizer)}
        for verbalizer in compared
    }
    return {"lineage": lineage, "selection": selection, "compared": named}


def _settings(config: RunConfig, verbalizer: Compared) -> list[str]:
    """In which settings of `sft` and `grpo` a verbalizer differs from this run's, if it tells."""
    if verbalizer.manifest is None:
        return ["unknown"]
    theirs, ours = verbalizer.manifest.config, to_dict(config)
    sections = [name for name in ("sft", "grpo") if name in theirs]
    return config_differences(
        {name: theirs[name] for name in sections}, {name: ours[name] for name in sections}
    )
