"""Takes descriptions over from the report on the run's own verbalizers alone.

A report on another arm, or on what `--compare` names, describes anew only what the run's own report
does not have. Protects the rule that a copied description is the one that would be made again: of
the same activations, by the same adapter, decoded the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from nla_ray.report.controls import INJECTED
from nla_ray.report.describing import decoding
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import RunConfig


def reuse_descriptions(
    run: Run, stage: Artifact, manifests: Mapping[str, Manifest], folder: Path
) -> None:
    """Copy files of descriptions into `folder` from the run's own report, where it is complete."""
    name = _own_report_name(run.config)
    report, contrastive = run.find(name), run.find("grpo")
    if name == stage.name or report is None or contrastive is None:
        return
    arm = run.config.grpo.artifact
    settings, previous = stage.config["evaluation"], report.config["evaluation"]
    same_rows = _is_unchanged("activations", manifests, report) and all(
        previous[field] == settings[field] for field in ("split", "max_activations", "seed")
    )
    same_length = (
        contrastive.fingerprint == report.parents["grpo"]
        and decoding(contrastive)["max_new_tokens"] == decoding(manifests[arm])["max_new_tokens"]
    )
    if not (same_rows and same_length):
        return
    described_by = {"sft": "sft", **dict.fromkeys(INJECTED, "sft"), "grpo": "grpo"}
    if arm == "grpo" and previous["samples"] == settings["samples"]:
        described_by["grpo_samples"] = "grpo"
    for verbalizer, artifact in described_by.items():
        path = f"descriptions/{verbalizer}.jsonl"
        copy = folder / path
        unchanged = _is_unchanged(artifact, manifests, report)
        if unchanged and path in report.files and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(run.verified(name, report, path).read_bytes())


def _own_report_name(config: RunConfig) -> str:
    """The artifact of the report on the contrastive arm, with nothing beside it."""
    grpo = dataclasses.replace(config.grpo, contrast="wrong", name=None)
    return dataclasses.replace(config, grpo=grpo, compare=()).report_artifact


def _is_unchanged(artifact: str, manifests: Mapping[str, Manifest], report: Manifest) -> bool:
    """Whether a report was made from the same content of an artifact as this one."""
    return artifact in manifests and manifests[artifact].fingerprint == report.parents[artifact]
