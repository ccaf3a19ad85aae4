"""Verbalizers that are not the run's own, named on the command line: `--compare NAME=PATH`.

PATH is a file of descriptions (JSONL: `activation_id`, `description`), an adapter folder, or a
folder that holds one beside its manifest (another run's artifact). What they say stands in every
table beside the run's own, under the same rules: nothing is left out, and an activation that a file
does not describe counts as described by the empty string.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nla_ray.base.identity import BaseInfo, check_base
from nla_ray.run.manifest import MANIFEST_NAME, Manifest

ADAPTER_CONFIG = "adapter_config.json"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of them. Example: Compared(name="other", path=Path("other.jsonl"), digest="3f2a...",
    manifest=None)"""

    name: str
    path: Path
    """The file of descriptions, or the adapter's own folder."""
    digest: str
    """SHA-256 of the content: another content makes another report."""
    manifest: Manifest | None
    """Of an artifact that lies beside the adapter; of anything else the lineage is unknown, and the
    report says so."""

    @property
    def is_adapter(self) -> bool:
        return self.path.is_dir()


def find_compared(wanted: Sequence[str], taken: Sequence[str]) -> list[Compared]:
    """What `NAME=PATH` arguments name. `taken`: names that the report has already.

    Raises ValueError for another form, a name that is taken, and a path that holds neither
    descriptions nor an adapter.
    """
    found: list[Compared] = []
    for argument in wanted:
        name, _, path = argument.partition("=")
        if not (_NAME.fullmatch(name) and path) or name in [*taken, *(one.name for one in found)]:
            raise ValueError(
                f"--compare: got {argument!r}, expected NAME=PATH with a name of lower-case"
                f" letters, digits and _ that is none of {', '.join(taken)}. Give it another name."
            )
        found.append(_find(name, Path(path).expanduser()))
    return found


def _find(name: str, path: Path) -> Compared:
    folder = next(
        (place for place in (path, path / "adapter") if (place / ADAPTER_CONFIG).is_file()), None
    )
    if folder is None and not path.is_file():
        raise ValueError(
            f"--compare {name}: got {path}, expected a JSONL file of descriptions, or a folder with"
            f" {ADAPTER_CONFIG} in it or in its folder adapter. Correct the path."
        )
    files = [path] if folder is None else sorted(one for one in folder.iterdir() if one.is_file())
    manifest = (
        next((place for place in (path, path.parent) if (place / MANIFEST_NAME).is_file()), None)
        if folder
        else None
    )
    return Compared(
        name=name,
        path=folder or path,
        digest=hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        manifest=(
            Manifest.from_json(
                (manifest / MANIFEST_NAME).read_text(), str(manifest / MANIFEST_NAME)
            )
            if manifest
            else None
        ),
    )


def check_compared(compared: Sequence[Compared], base: BaseInfo) -> None:
    """Raise ValueError for an adapter that was made for another base or layer."""
    for one in compared:
        if one.manifest is not None:
            check_base(one.manifest, base)


def read_descriptions(file: Path, activation_ids: Sequence[str]) -> tuple[list[str], int]:
    """One description for each activation, in their order, and how many the file does not have
    (described by "").

    Raises ValueError, naming the line, for a row that is no description or that comes twice, and
    when no row is about any of the activations.
    """
    texts: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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
    missing = sum(one not in texts for one in activation_ids)
    if missing == len(activation_ids):
        raise ValueError(
            f"{file}: got {len(texts)} descriptions, none of one of the {len(activation_ids)} test"
            f" activations, expected ids like {activation_ids[0]!r}. Describe this run's test"
            " activations."
        )
    return [texts.get(one, "") for one in activation_ids], missing
