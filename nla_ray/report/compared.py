"""Verbalizers that are not the run's own, named on the command line: `--compare NAME=PATH`.

PATH is a file of descriptions (JSONL: `activation_id`, `description`), an adapter folder, a folder
with an adapter and its manifest (another run's artifact), or a whole verbalizer in the layout of
the reference implementation, of the same base and layer. What they say is a row of every
table, under the rules of every row: nothing is left out, and an activation that a file does not
describe counts as described by the empty string. A file whose first line does not say how it was
generated is in no paired difference; a report's own files say so, and for descriptions that nobody
generated the line is `{"protocol": "not generated"}`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nla_ray.base.identity import BaseInfo, check_base
from nla_ray.base.reference import (
    REFERENCE_MANIFEST,
    ReferenceFacts,
    check_reference_base,
    is_reference,
    read_reference,
)
from nla_ray.base.sources import checkpoint_digest
from nla_ray.description.files import is_protocol, protocol_in
from nla_ray.description.protocol import GenerationProtocol
from nla_ray.run.manifest import MANIFEST_NAME, Manifest

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder is known to be an adapter's."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A verbalizer that is named on the command line.

    Example: Compared(name="theirs", path=Path("theirs.jsonl"), digest="3f2a...", manifest=None)
    """

    name: str
    path: Path
    """The file of descriptions, or the folder with the adapter's files in it."""
    digest: str
    """SHA-256 of the content: another content makes another report."""
    manifest: Manifest | None
    """The manifest of an artifact. Without one the lineage is unknown, and the report says so."""
    run_folder: Path | None = None
    """The run that the artifact lies in."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file of descriptions."""
        return self.path.is_file()

    @property
    def facts(self) -> ReferenceFacts | None:
        """Of a whole verbalizer in the reference layout; None of anything else.

        Raises ValueError for a folder of it that is no verbalizer's.
        """
        return read_reference(self.path, "verbalizer") if is_reference(self.path) else None

    @property
    def protocol(self) -> GenerationProtocol | None:
        """How a file of descriptions was generated, where it says so.

        Raises ValueError for a protocol that is damaged.
        """
        return protocol_in(self.path.read_bytes(), str(self.path))


def find_compared(wanted: Sequence[str], taken: Sequence[str]) -> list[Compared]:
    """What `NAME=PATH` arguments name. `taken`: names that the report has already.

    Raises ValueError for another form, a name that is taken, and a path that holds neither
    descriptions nor an adapter.
    """
    found: list[Compared] = []
    for argument in wanted:
        name, _, path = argument.partition("=")
        used = [*taken, *(verbalizer.name for verbalizer in found)]
        if not (_NAME.fullmatch(name) and path) or name in used:
            raise ValueError(
                f"--compare: got {argument!r}, expected NAME=PATH with a name of lower-case"
                f" letters, digits and _ that is none of {', '.join(taken)}. Give it another name."
            )
        found.append(_find(name, Path(path).expanduser()))
    return found


def _find(name: str, path: Path) -> Compared:
    if is_reference(path):
        return Compared(name=name, path=path, digest=checkpoint_digest(path), manifest=None)
    folder = _first_with(ADAPTER_CONFIG, path, path / "adapter")
    if folder is None and not path.is_file():
        raise ValueError(
            f"--compare {name}: got {path}, expected a JSONL file of descriptions, a folder with"
            f" {ADAPTER_CONFIG} in it or in its folder adapter, or a verbalizer with"
            f" {REFERENCE_MANIFEST}. Correct the path."
        )
    files, manifest, run_folder = [path], None, None
    if folder is not None:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        artifact = _first_with(MANIFEST_NAME, path, path.parent)
        if artifact is not None:
            source = artifact / MANIFEST_NAME
            manifest = Manifest.from_json(source.read_text(), str(source))
            run_folder = artifact.resolve().parent
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Compared(
        name=name, path=folder or path, digest=digest, manifest=manifest, run_folder=run_folder
    )


def _first_with(file_name: str, *folders: Path) -> Path | None:
    """The first of these folders that has the file."""
    return next((folder for folder in folders if (folder / file_name).is_file()), None)


def check_compared(compared: Sequence[Compared], base: BaseInfo) -> None:
    """Raise ValueError for an adapter, or a whole verbalizer, of another base or layer."""
    for verbalizer in compared:
        if (facts := verbalizer.facts) is not None:
            check_reference_base(facts, base, f"--compare {verbalizer.name}")
        if verbalizer.manifest is not None:
            check_base(verbalizer.manifest, base)


def read_descriptions(file: Path, activation_ids: Sequence[str]) -> tuple[list[str], int]:
    """A description for each activation, in their order; and how many the file does not have.

    Those are described by "". Raises ValueError for a row that is no description or that comes
    twice, naming the line, and when no row is about any of the activations.
    """
    texts: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if number == 1 and is_protocol(row):
                continue
            activation_id, text = row["activation_id"], row["description"]
        except (json.JSONDecodeError, KeyError, TypeError):
            activation_id = text = None
        if (
            not isinstance(activation_id, str)
            or not isinstance(text, str)
            or activation_id in texts
        ):
            raise ValueError(
                f"{file}, line {number}: got {line[:60]!r}, expected one JSON object with strings"
                " `activation_id` and `description`, each activation once. Correct the file."
            )
        texts[activation_id] = text
    missing = sum(activation_id not in texts for activation_id in activation_ids)
    if missing == len(activation_ids):
        raise ValueError(
            f"{file}: got {len(texts)} descriptions, none of one of the {len(activation_ids)} test"
            f" activations, expected ids like {activation_ids[0]!r}. Describe this run's test"
            " activations."
        )
    return [texts.get(activation_id, "") for activation_id in activation_ids], missing
