"""Fits how likely a claim of the GRPO verbalizer is in the text: artifact `claim_confidence`.

Validation activations -> a greedy description and samples of each -> their claims, with what speaks
for each -> one logistic regression on whether the texts have them. The probe that is asked is
fitted to train rows. Test documents are not read, so that a report can say what it is worth.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nla_ray.activation.bank import ActivationTable, drawn_rows
from nla_ray.activation.stage import load_activations, load_stats
from nla_ray.base.adapter_files import adapter_digest
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_tokenizer
from nla_ray.cluster.resources import run_placed
from nla_ray.description.files import DescriptionFile
from nla_ray.description.protocol import generation_protocol
from nla_ray.description.record import Description
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.claim_confidence import ClaimConfidence, gather_claims
from nla_ray.score.claims import claim_outcomes
from nla_ray.score.cross_fit import cross_fit
from nla_ray.settings.config import RunConfig

CLAIM_CONFIDENCE = "claim_confidence"
_CHUNK = 256
"""Activations handed to the engine at once: an interruption loses little."""
_SLOTS = 256

logger = get_logger(__name__)


def make_claim_confidence(run: Run) -> Manifest:
    """The stage: the artifact's manifest. Skipped when complete.

    One process that is placed like one of the scorers; it goes on where it was cut off.
    """
    check_base(run.require("activations"), base_info(run.config.base))
    if run.open(CLAIM_CONFIDENCE).manifest is None:
        run_placed(run.config, "scorer", fit_claim_confidence)
    return run.require(run.config.claim_confidence_artifact)


def fit_claim_confidence(config: RunConfig) -> None:
    """The whole of it, in this process."""
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run, settings = Run(config), config.claim_confidence
    stage, mean = run.open(CLAIM_CONFIDENCE), torch.tensor(load_stats(run)["mean_direction"])
    train = load_activations(run, "train")
    probe = cross_fit(train.vectors, train.texts, train.family_ids, mean, settings.seed).whole
    table = load_activations(run, "validation")
    if settings.max_activations is not None:
        table = table.select(drawn_rows(len(table), settings.max_activations, settings.seed))
    greedy, samples = _described(run, stage, table)
    texts = [description.text for description in greedy]
    said = gather_claims(
        probe,
        table.vectors,
        texts,
        [description.claim_log_probs or {} for description in greedy],
        [[sample.text for sample in drawn] for drawn in samples],
    )
    flat = [claim for row in said for claim in row]
    outcomes = map(claim_outcomes, texts, table.texts)
    is_found = [found for row in outcomes for found in row.values()]
    confidence = ClaimConfidence.fit(probe, flat, is_found)
    metrics = {"claims": len(flat), "found": sum(is_found), "activations": len(table)}
    logger.info("%s: %d of %d claims are in their texts", stage.name, sum(is_found), len(flat))
    with stage.local_folder() as folder:
        confidence.save(Path(folder))
    stage.publish(documents={"train": train.doc_ids, "validation": table.doc_ids}, metrics=metrics)


def _described(
    run: Run, stage: Artifact, table: ActivationTable
) -> tuple[list[Description], list[list[Description]]]:
    """Of every activation a greedy description, and samples as GRPO drew them."""
    config, settings = run.config, run.config.claim_confidence
    arm = config.grpo.artifact
    manifest, count = run.require(arm), settings.samples
    decoded = manifest.config["grpo"]
    with run.local_copy(arm, manifest, "adapter") as adapter, stage.local_folder() as folder:
        weights = {"base": manifest.model["digest"], "adapter": adapter_digest(adapter)}
        verbalizer = Verbalizer.load(
            config.base, adapter, neighbours=manifest.model["neighbours"], max_slots=_SLOTS
        )

        def written(
            name: str, *, with_claims: bool = False, **decoding: float
        ) -> list[Description]:
            protocol = generation_protocol(
                config.base,
                load_tokenizer(config.base),
                max_new_tokens=decoded["max_new_tokens"],
                weights=weights,
                **decoding,
            )
            return DescriptionFile(Path(folder) / f"{name}.jsonl", table.ids, protocol).complete(
                lambda start, stop: verbalizer.describe_under(
                    protocol, table.injected[start:stop], start, with_claims=with_claims
                ),
                _CHUNK,
            )

        greedy = written("greedy", with_claims=True)
        flat = written(
            "samples", samples=count, temperature=decoded["temperature"], seed=settings.seed
        )
    return greedy, [flat[start : start + count] for start in range(0, len(flat), count)]


def load_claim_confidence(run: Run) -> ClaimConfidence:
    """What the stage has fitted. Raises ValueError when there is none."""
    name = run.config.claim_confidence_artifact
    with run.local_copy(name, run.require(name)) as folder:
        return ClaimConfidence.load(folder)
