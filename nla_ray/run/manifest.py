"""The manifest: the file in every artifact that says what it is and what it was made from.

It is written last: an artifact with a manifest is complete. This module knows nothing of folders or
file systems. It protects lineage: no document that was learned from is reported on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nla_ray.settings.config import config_hash

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of an artifact."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Identity of one artifact."""

    name: str
    """The artifact's name in the run: that of its stage, or a name of its own."""
    config: dict[str, Any]
    """The resolved configuration it was made with (the sections that shape it)."""
    config_hash: str
    """Hash of the recipe in `config` and of `parents`; before there were recipes, of all."""
    parents: dict[str, str] = field(default_factory=dict)
    """Fingerprint of every artifact it was made from, by name."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Every file, by path inside the artifact."""
    documents: dict[str, list[str]] = field(default_factory=dict)
    """doc_ids by use: `train` (learned from), `validation` (chosen on), `test` (reported on)."""
    model: dict[str, Any] = field(default_factory=dict)
    """The base: name, digests, layer, d_model, injection norm, marker and its neighbours."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures of the stage: counts, losses, the best step."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions of Python and of the libraries that shape the numbers."""
    created: str = ""
    """UTC, ISO 8601."""
    schema_version: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """Hash of what the artifact IS: name, configuration, parents and files.

        When it was made, and on what, changes nothing.
        """
        files = {path: record.sha256 for path, record in sorted(self.files.items())}
        return config_hash(
            {"name": self.name, "config": self.config_hash, "parents": self.parents, "files": files}
        )

    def to_json(self) -> str:
        """The manifest as its file holds it, with its fingerprint."""
        values = {**dataclasses.asdict(self), "fingerprint": self.fingerprint}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """The manifest that a file holds.

        Raises ValueError, naming `source`, for a text that is not a manifest of this schema, and
        for one that was edited. The fingerprint tells of files, configuration and parents; not of
        documents, metrics and model.
        """
        try:
            fields = json.loads(text)
            fingerprint = fields.pop("fingerprint")
            files = {path: FileRecord(**record) for path, record in fields.pop("files").items()}
            manifest = cls(files=files, **fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{source}: not a manifest of schema {SCHEMA_VERSION} ({type(error).__name__}:"
                f" {error}). Delete that artifact's folder and run its job again."
            ) from None
        if manifest.fingerprint != fingerprint:
            raise ValueError(
                f"{source}: got fingerprint {fingerprint}, expected {manifest.fingerprint} from its"
                " own content. The file was edited; delete that artifact's folder and run its job"
                " again."
            )
        return manifest


def check_lineage(
    report_documents: Iterable[str],
    ancestors: Mapping[str, Manifest],
    uses: Sequence[str] = ("train", "validation"),
    families: Mapping[str, str] | None = None,
) -> None:
    """Raise ValueError when an ancestor learned from a report's document, or was chosen on it.

    `families`: doc_id -> family id of documents that share text. What is of one family counts as
    one document.
    """
    families = families or {}
    reported = {families.get(doc_id, doc_id) for doc_id in report_documents}
    for name, manifest in ancestors.items():
        for use in uses:
            used = manifest.documents.get(use, ())
            leaked = sorted(doc_id for doc_id in used if families.get(doc_id, doc_id) in reported)
            if leaked:
                raise ValueError(
                    f"lineage: {len(leaked)} documents of the report were in the {use} documents of"
                    f" {name}: {leaked[:3]}, expected none, nor any that shares text with one."
                    " Build the corpus again; its split must come from the family's id alone."
                )


def check_disjoint(first: Manifest, second: Manifest) -> None:
    """Raise ValueError when two scorers learned from a common document."""
    learned_from = set(first.documents.get("train", ()))
    common = sorted(learned_from.intersection(second.documents.get("train", ())))
    if common:
        raise ValueError(
            f"{first.name} and {second.name} share {len(common)} train documents: {common[:3]},"
            " expected none. Train one of them again on the other half of the documents."
        )
