"""Fills an `Evaluated`: who says what of the test activations, and what every scorer reads in it.

Knows the run and its artifacts; computes no figure. Protects the rule that nothing is dropped:
every verbalizer has one description a row, in the rows' order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_ray.activation.bank import ActivationTable, drawn_rows
from nla_ray.activation.stage import load_activations, load_stats
from nla_ray.base.load import load_tokenizer
from nla_ray.description.files import DescriptionFile
from nla_ray.description.protocol import NOT_GENERATED
from nla_ray.description.record import Description
from nla_ray.report.claim_confidence import (
    JudgedClaims,
    claim_probabilities,
    confident_descriptions,
    judged_claims,
)
from nla_ray.report.compared import Compared
from nla_ray.report.controls import CONFIDENT, REFRESHED, VERBALIZERS, artifact_of, trained_in
from nla_ray.report.describing import Described, describe_all
from nla_ray.report.differences import Differences
from nla_ray.report.evaluated import Evaluated, LayerRows, texts_to_read
from nla_ray.report.lengths import cut_pairs, cut_texts
from nla_ray.report.matched import train_words
from nla_ray.report.pairing import comparable_pairs
from nla_ray.report.patch_back import patch_reconstructions
from nla_ray.report.readings import Readings, reconstruct_texts
from nla_ray.report.reuse import OwnReport
from nla_ray.report.summary import PREFIX_TOKENS
from nla_ray.report.wording import reword_descriptions
from nla_ray.run.artifact import Run
from nla_ray.run.manifest import Manifest
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.linear import LinearReconstructor, further_file
from nla_ray.settings.config import require
from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.training.claim_confidence import load_claim_confidence

PREFIX_ROWS = 400
"""Activations, chosen by seed, whose descriptions are also read in part."""
REWORDED_ROWS = 100
"""Of these, whose descriptions are also read reworded: differences are paired, so fewer will do."""


def gather_evaluated(
    run: Run,
    manifests: Mapping[str, Manifest],
    test: ActivationTable,
    compared: Sequence[Compared],
    folder: Path,
    own_report: OwnReport,
) -> Evaluated:
    """All descriptions of the test activations, and what the scorers read in them.

    `folder`: the report's, where they are kept as they come. `own_report`: may have some already.
    """
    config, seed, scratch = run.config, run.config.evaluation.seed, folder / "scratch"
    mean, train = torch.tensor(load_stats(run)["mean_direction"]), load_activations(run, "train")
    words = train_words(run, train, test, mean)
    written = describe_all(
        run, manifests, train, test, mean, folder / "descriptions", compared, own_report, words
    )
    judged = _judge_claims(run, manifests, test, written, folder / "descriptions")
    said, samples = written.by_verbalizer, written.samples
    # In the order of the tables; what was named on the command line comes last.
    names = [name for name in dict.fromkeys([*VERBALIZERS, *said]) if name in said]
    descriptions = {name: said[name] for name in names}
    prefix_rows, tokenizer = drawn_rows(len(test), PREFIX_ROWS, seed), load_tokenizer(config.base)
    read_in_part = [name for name in names if name in ("gold", *trained_in(manifests))]
    prefixes = _prefixes(tokenizer, descriptions, read_in_part, prefix_rows)
    protocols = {name: written.protocols[name] for name in names}
    from_elsewhere = [verbalizer.name for verbalizer in compared]
    cut = cut_pairs(tokenizer, descriptions, comparable_pairs(names, protocols, from_elsewhere))
    reworded_rows = prefix_rows[:: PREFIX_ROWS // REWORDED_ROWS]
    reworded = reword_descriptions(descriptions, read_in_part, reworded_rows)
    wanted = texts_to_read(descriptions, samples, prefixes, cut.values(), reworded.values())
    readings = reconstruct_texts(run, manifests, wanted, scratch)
    return Evaluated(
        doc_ids=test.doc_ids,
        family_ids=test.family_ids,
        domains=test.domains,
        texts=test.texts,
        salient=words.salient(test.texts),
        comparisons=_comparisons(test, test.vectors, mean, seed),
        descriptions=descriptions,
        protocols=protocols,
        from_elsewhere=from_elsewhere,
        samples=samples,
        differences=_read_differences(run, manifests, written.differences, scratch),
        sampled=config.grpo.artifact,
        prefix_rows=prefix_rows,
        prefixes=prefixes,
        cut=cut,
        refreshed=_read_refreshed(run, manifests, descriptions, read_in_part, scratch),
        reworded=reworded,
        reworded_rows=reworded_rows,
        probed=words.probed,
        readings=readings,
        patched=patch_reconstructions(run, test, descriptions, readings, mean, scratch),
        domain_names=_domain_names(test.domains),
        judged_claims=judged,
        layers=_layers(run, manifests, test, written),
        layer=config.base.layer,
    )


def _layers(
    run: Run, manifests: Mapping[str, Manifest], test: ActivationTable, written: Described
) -> dict[int, LayerRows]:
    """What is said of the further layers, and what the linear scorer fitted to each reads in it."""
    config, manifest = run.config, manifests[artifact_of("linear")]
    found: dict[int, LayerRows] = {}
    model = None
    for layer, rows in written.layers.items():
        said = {"gold": written.by_verbalizer["gold"], **written.by_layer[layer]}
        read: dict[str, Tensor] = {}
        if further_file(layer) in manifest.files:
            with run.local_copy(manifest.name, manifest) as folder:
                scorer = LinearReconstructor.load(
                    config.base, folder, model=model, name=further_file(layer)
                )
            model, size = scorer.model, config.evaluation.batch_size
            for name, descriptions in said.items():
                texts = [description.text for description in descriptions]
                read[name] = scorer.reconstruct(texts, size)
        mean = torch.tensor(load_stats(run, layer)["mean_direction"])
        found[layer] = LayerRows(
            comparisons=_comparisons(test, rows, mean, config.evaluation.seed),
            descriptions=said,
            read=read,
        )
    return found


def _comparisons(test: ActivationTable, rows: Tensor, mean: Tensor, seed: int) -> Comparisons:
    """The same of every layer's activations [rows, d_model] of the test tokens."""
    return Comparisons.draw(rows, test.doc_ids, mean, seed, test.domains, test.family_ids)


def _read_refreshed(
    run: Run,
    manifests: Mapping[str, Manifest],
    descriptions: Mapping[str, Sequence[Description]],
    names: Sequence[str],
    scratch: Path,
) -> Readings | None:
    """What the refreshed scorer reads, where the report is made with it: see `Evaluated`."""
    if artifact_of(REFRESHED) not in manifests:
        return None
    texts = {description.text for name in names for description in descriptions[name]}
    return reconstruct_texts(run, manifests, texts, scratch, [REFRESHED])


def _read_differences(
    run: Run, manifests: Mapping[str, Manifest], differences: Differences | None, scratch: Path
) -> Differences | None:
    """With what every scorer reads in what is said of them."""
    if differences is None:
        return None
    texts = {text for said in differences.said.values() for text in said}
    readings = reconstruct_texts(run, manifests, texts, scratch)
    return dataclasses.replace(differences, readings=readings)


def _judge_claims(
    run: Run,
    manifests: Mapping[str, Manifest],
    test: ActivationTable,
    written: Described,
    folder: Path,
) -> JudgedClaims | None:
    """How likely the arm's claims are, where a report with enough samples is made with it.

    One on validation is about what it was fitted to: it has none. Where the settings ask for it,
    what is left of the descriptions without unlikely claims is `written` too.
    """
    settings, arm = run.config.evaluation, run.config.grpo.artifact
    likely = _claim_probabilities(run, manifests, test, written)
    require(
        likely is not None or settings.min_claim_confidence is None,
        "confidence of claims for evaluation.min_claim_confidence",
        "none that fits these descriptions and samples",
        f"the artifact {run.config.claim_confidence_artifact} as parent of the report, and as many"
        " samples as it was learned with",
        "Delete this report and run jobs/evaluate.py again.",
    )
    if likely is None:
        return None
    described = written.by_verbalizer[arm]
    if settings.min_claim_confidence is not None:
        confident = f"{arm}_{CONFIDENT}"
        kept = confident_descriptions(
            load_tokenizer(run.config.base), described, likely, settings.min_claim_confidence
        )
        DescriptionFile(folder / f"{confident}.jsonl", test.ids, NOT_GENERATED).write(kept)
        written.by_verbalizer[confident], written.protocols[confident] = kept, NOT_GENERATED
    return judged_claims(likely, [description.text for description in described], test.texts)


def _claim_probabilities(
    run: Run, manifests: Mapping[str, Manifest], test: ActivationTable, written: Described
) -> list[dict[str, float]] | None:
    name, described = run.config.claim_confidence_artifact, written.by_verbalizer
    if name not in manifests or run.config.evaluation.split != "test":
        return None
    count = manifests[name].config["claim_confidence"]["samples"]
    if not written.samples or len(written.samples[0]) < count:
        return None
    samples = [drawn[:count] for drawn in written.samples]
    return claim_probabilities(
        load_claim_confidence(run), test.vectors, described[run.config.grpo.artifact], samples
    )


def _prefixes(
    tokenizer: Any,
    descriptions: Mapping[str, Sequence[Description]],
    names: Sequence[str],
    rows: Sequence[int],
) -> dict[str, dict[int, list[str]]]:
    """Every description of these rows cut to its first tokens, by verbalizer and their number."""
    prefixes: dict[str, dict[int, list[str]]] = {}
    for name in names:
        texts = [descriptions[name][row].text for row in rows]
        prefixes[name] = {
            length: cut_texts(tokenizer, texts, [length] * len(texts)) for length in PREFIX_TOKENS
        }
    return prefixes


def _domain_names(domains: Sequence[str]) -> dict[str, str]:
    """The human name of every domain of the rows and of every domain that a teacher may name."""
    return {**{domain: domain.replace("_", " ") for domain in domains}, **DOMAIN_NAMES}
