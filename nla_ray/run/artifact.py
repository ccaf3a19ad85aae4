"""A run and its artifacts: published atomically, skipped when complete, resumed when not.

A run is a folder (local, or any pyarrow filesystem URI) with a folder for each artifact. A stage
opens its artifact with `run.open(...)`, writes files, and ends with `artifact.publish(...)`, which
writes the manifest last. It knows no stage but by its row in the table.

It protects the rule: never a silent mix. An artifact was made with the run's configuration and from
the run's parents, or there is an error.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from nla_ray.run.location import Location, copy_files, mirror_folder
from nla_ray.run.lock import take_lock
from nla_ray.run.manifest import MANIFEST_NAME, Manifest
from nla_ray.run.recipe import recipe_differences, recipe_of
from nla_ray.run.stages import STAGES, Stage, job_of, stage_named
from nla_ray.settings.config import RunConfig, config_hash, to_dict
from nla_ray.settings.precision import training_dtype

_STARTED_NAME = "started.json"
"""Configuration of an artifact that is being made; gone when its manifest is there."""
_LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "pyarrow")
"""Whose versions a manifest records: those that shape the numbers."""


class Artifact:
    """An artifact of a run: found complete, or open to be made.

    Raises ValueError when the folder holds one of another configuration or of other parents.
    """

    def __init__(
        self, run: Run, name: str, config: dict[str, Any], parents: Mapping[str, Manifest]
    ) -> None:
        self.run, self.name, self.config = run, name, config
        self.location = run.root / name
        """The artifact's folder."""
        self._parents = {parent: manifest.fingerprint for parent, manifest in parents.items()}
        recipe = recipe_of(name, config)
        self._hash = config_hash({"config": recipe, "parents": self._parents})
        self.manifest = self._find_manifest()
        """None: the artifact is not complete."""
        if self.manifest is None:
            self._mark_started()

    @property
    def complete(self) -> bool:
        """Whether the artifact was made, with this configuration from these parents."""
        return self.manifest is not None

    def _find_manifest(self) -> Manifest | None:
        manifest = self.run.find(self.name)
        if manifest is not None:
            self._require_same(manifest.config, manifest.parents)
        return manifest

    def _mark_started(self) -> None:
        started = self.run.started(self.name)
        if started is not None:
            self._require_same(started["config"], started["parents"])
            return
        identity = {"config": self.config, "parents": self._parents}
        (self.location / _STARTED_NAME).write_text(json.dumps(identity, indent=1))

    def _require_same(self, stored_config: dict[str, Any], stored_parents: dict[str, str]) -> None:
        """Raise ValueError unless that is the same recipe, of the same parents.

        The hash is not compared: other versions of this program made it of other fields.
        """
        changes = recipe_differences(self.name, stored_config, self.config) or [
            f"parent {name}: there {stored_parents.get(name)}, here {self._parents.get(name)}"
            for name in sorted({*stored_parents, *self._parents})
            if stored_parents.get(name) != self._parents.get(name)
        ]
        if changes:
            raise ValueError(
                f"artifact {self.name!r} in {self.location}: it was made with another"
                f" configuration ({'; '.join(changes[:4])}), expected the same. Repeat the flags it"
                f" was made with, use another --run-dir, or delete {self.location}."
            )

    def reopen(self) -> None:
        """Turn a complete artifact into one that is being made, and keep its files.

        A stage that goes on from one of the files verifies that file before.
        """
        (self.location / MANIFEST_NAME).delete()
        self.manifest = None
        self._mark_started()

    def publish(
        self,
        *,
        documents: dict[str, list[str]] | None = None,
        model: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Manifest:
        """Hash every file, write the manifest last, and return it."""
        files = {
            path: (self.location / path).record()
            for path in self.location.list_files()
            if path not in (MANIFEST_NAME, _STARTED_NAME)
            and not path.startswith("scratch/")
            and not path.endswith(".tmp")
        }
        manifest = Manifest(
            name=self.name,
            config=self.config,
            config_hash=self._hash,
            parents=self._parents,
            files=files,
            documents={use: sorted(set(ids)) for use, ids in (documents or {}).items()},
            model=model or {},
            metrics=metrics or {},
            environment=_environment(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (self.location / MANIFEST_NAME).write_text(manifest.to_json())
        (self.location / _STARTED_NAME).delete()
        (self.location / "scratch").delete()
        self.manifest = manifest
        return manifest

    @contextmanager
    def local_folder(self) -> Iterator[Path]:
        """A local folder for libraries that know only paths; its files land in the artifact.

        On a local run it is the artifact's own folder. Else its files are copied every minute and
        on exit, so that a process that is killed loses a minute. Publishing removes `scratch/`.
        """
        if self.location.is_local:
            Path(self.location.path).mkdir(parents=True, exist_ok=True)
            yield Path(self.location.path)
            return
        with tempfile.TemporaryDirectory(prefix="nla_ray_") as folder:
            copy_files(self.location, Location.of(folder))
            with mirror_folder(Path(folder), self.location):
                yield Path(folder)


class Run:
    """A run directory and the configuration it is worked on with."""

    def __init__(self, config: RunConfig) -> None:
        self.given = config
        """The configuration as it was asked for; `config` is what it means for this run."""
        self.root = Location.of(config.run_dir)

    @cached_property
    def config(self) -> RunConfig:
        """The configuration with a `training_dtype` that is no longer `auto`.

        So one recipe trains in one precision, on whatever machine the run goes on: that of what is
        trained here already, else the one that is fast on this machine.
        """
        base = self.given.base
        if base.training_dtype != "auto":
            return self.given
        dtype = self._recorded_training_dtype() or training_dtype(self.given)
        return dataclasses.replace(self.given, base=dataclasses.replace(base, training_dtype=dtype))

    def _recorded_training_dtype(self) -> Any:
        """The precision in which the run's scorers and verbalizers are trained; None: not said."""
        for stage in STAGES:
            if stage.kind in ("scorer", "verbalizer"):
                config, _ = self.recorded(stage.artifact(self.given)) or ({}, {})
                dtype = config.get("base", {}).get("training_dtype", "auto")
                if dtype != "auto":
                    return dtype
        return None

    def open_artifact(
        self,
        name: str,
        *sections: str,
        parents: Mapping[str, Manifest] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Open artifact `name`, shaped by these sections of the configuration.

        `parents`: the manifests it is made from, by artifact. `inputs`: what else shapes it, by
        name: digests of files outside the run, the version of an algorithm. Raises ValueError when
        the folder holds one of another configuration or of other parents.
        """
        plain = to_dict(self.config)
        config = {section: plain[section] for section in sections}
        if inputs:
            config["inputs"] = dict(inputs)
        return Artifact(self, name, config, parents or {})

    def open(
        self,
        stage: str,
        *,
        parents: Mapping[str, Manifest] | None = None,
        inputs: Mapping[str, str] | None = None,
        algorithm: str | None = None,
    ) -> Artifact:
        """Open the artifact of a stage, with sections and parents as the table of stages says.

        `parents` replaces the table's. `algorithm`: version of what settings do not tell, part of
        the identity in place of `inputs`; a complete artifact is taken by whichever. Raises
        ValueError that names the job of a missing parent, or the difference to the artifact in the
        folder.
        """
        row = stage_named(stage)
        name = row.artifact(self.config)
        if algorithm is not None:
            complete = self.find(name)
            inputs = complete.config.get("inputs") if complete else {"algorithm": algorithm}
        return self.open_artifact(
            name,
            *row.sections,
            parents=self.parents_of(stage) if parents is None else parents,
            inputs=inputs,
        )

    def parents_of(self, stage: str) -> dict[str, Manifest]:
        """Manifests of a stage's parents, by artifact.

        An optional one is among them when it is complete and the stage's artifact was not made, or
        begun, without it: when the stage's settings ask for it or, where the stage has none that
        could, when another parent was made from it. Raises ValueError that names the job of a
        missing one.
        """
        row = stage_named(stage)
        parents = [stage_named(parent) for parent in row.parents]
        names = [parent.parent_artifact(self.config) for parent in parents]
        manifests = {name: self.require(name) for name in names}
        if row.optional_parents:
            recorded = self.recorded(row.artifact(self.config))
            for parent in row.optional_parents:
                name = stage_named(parent).parent_artifact(self.config)
                if recorded is None:
                    is_parent = self._is_begun_with(parent, row, manifests)
                else:
                    is_parent = name in recorded[1]
                if is_parent:
                    manifests[name] = self.require(name)
        return manifests

    def _is_begun_with(self, optional: str, row: Stage, manifests: Mapping[str, Manifest]) -> bool:
        """Whether a new artifact of these parents is made from an optional stage as well."""
        if row.optional_when is not None:
            return row.takes_optional(self.config)
        name = stage_named(optional).parent_artifact(self.config)
        if any(optional in stage_named(parent).optional_parents for parent in row.parents):
            return any(name in manifest.parents for manifest in manifests.values())
        return self.find(name) is not None

    def recorded(self, name: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        """Configuration of an artifact and fingerprints of its parents; None: it does not exist.

        Of one that is complete or begun.
        """
        if (manifest := self.find(name)) is not None:
            return manifest.config, manifest.parents
        started = self.started(name)
        return None if started is None else (started["config"], started["parents"])

    def find(self, name: str) -> Manifest | None:
        """The manifest of a complete artifact, or None."""
        path = self.root / name / MANIFEST_NAME
        return Manifest.from_json(path.read_text(), str(path)) if path.exists() else None

    def started(self, name: str) -> dict[str, Any] | None:
        """`config` and `parents` of an artifact that is being made, or None."""
        path = self.root / name / _STARTED_NAME
        return json.loads(path.read_text()) if path.exists() else None

    def require(self, name: str) -> Manifest:
        """The manifest of artifact `name`. Raises ValueError that names the job which makes it."""
        manifest = self.find(name)
        if manifest is None:
            raise ValueError(
                f"artifact {name!r}: got none in {self.root}, expected a complete one. Make it"
                f" with: python jobs/{job_of(name)}.py --preset {shlex.quote(self.config.preset)}"
                f" --run-dir {shlex.quote(self.config.run_dir)}"
            )
        return manifest

    def verified(self, name: str, manifest: Manifest, path: str) -> Location:
        """A file of an artifact, whose size and hash are those of the manifest.

        Raises ValueError if they differ.
        """
        location = self.root / name / path
        expected = manifest.files[path]
        actual = location.record() if location.exists() else None
        if actual != expected:
            found = (
                "no file" if actual is None else f"{actual.size} bytes, sha256 {actual.sha256[:12]}"
            )
            raise ValueError(
                f"{location}: got {found}, expected {expected.size} bytes, sha256"
                f" {expected.sha256[:12]}. The file is damaged; delete {self.root / name} and run"
                " its job again."
            )
        return location

    @contextmanager
    def local_copy(self, name: str, manifest: Manifest, prefix: str = "") -> Iterator[Path]:
        """A local folder with an artifact's files below `prefix`, all verified."""
        paths = [path for path in manifest.files if path.startswith(prefix)]
        locations = {path: self.verified(name, manifest, path) for path in paths}
        if self.root.is_local:
            yield Path(self.root.path) / name / prefix
            return
        with tempfile.TemporaryDirectory(prefix="nla_ray_") as folder:
            for path, location in locations.items():
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(location.read_bytes())
            yield Path(folder) / prefix

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises ValueError when another process works on the same directory.
        """
        lock = take_lock(self.root)
        try:
            yield
        finally:
            lock.release()


def _environment() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
