"""Takes descriptions over from the report on the run's own verbalizers alone.

A report on another arm, or on what `--compare` names, describes anew only what the run's own report
does not have. Protects the rule that a copied description is the one that would be made again: of
the same activations, under the same generation protocol, weights included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from nla_ray.description.files import protocol_in
from nla_ray.description.protocol import GenerationProtocol
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import RunConfig

_ROWS = ("split", "max_activations", "seed")
"""Settings of evaluation that choose the activations, and what is injected by controls."""


class OwnReport:
    """The files of descriptions of the run's own report, where it is about the same activations."""

    def __init__(self, run: Run, stage: Artifact, manifests: Mapping[str, Manifest]) -> None:
        """`stage`: the report that is being made from `manifests`."""
        self._run, self._name = run, _own_report_name(run.config)
        report = run.find(self._name)
        if report is not None and not _has_same_rows(report, stage, manifests):
            report = None
        self._report = report

    def take_over(self, path: str, protocol: GenerationProtocol, target: Path) -> None:
        """Copy a file of the report to `target`, where it was generated under this protocol."""
        if self._report is None or path not in self._report.files:
            return
        content = self._run.verified(self._name, self._report, path).read_bytes()
        recorded = protocol_in(content, path)
        if recorded is not None and recorded.hash == protocol.hash:
            target.write_bytes(content)


def _own_report_name(config: RunConfig) -> str:
    """The artifact of the report on the contrastive arm, with nothing beside it."""
    grpo = dataclasses.replace(config.grpo, contrast="wrong", name=None)
    return dataclasses.replace(config, grpo=grpo, compare=(), seeds=()).report_artifact


def _has_same_rows(report: Manifest, stage: Artifact, manifests: Mapping[str, Manifest]) -> bool:
    """Whether a report is another one than this, on the same activations."""
    settings, previous = stage.config["evaluation"], report.config["evaluation"]
    return (
        report.name != stage.name
        and report.parents["activations"] == manifests["activations"].fingerprint
        and all(previous[field] == settings[field] for field in _ROWS)
    )
