"""Run directories: where artifacts lie, how they are published atomically, skipped when complete
and resumed.

A run is a folder (local, or any pyarrow filesystem URI) with one folder per artifact. A stage opens
its artifact with `run.stage(...)`, writes files, and ends with `stage.publish(...)`, which writes
the manifest last. Protects the rule: never a silent mix. What lies there was made with this
configuration from these parents, or there is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from nla_ray.config import RunConfig, config_hash, to_dict
from nla_ray.manifest import MANIFEST_NAME, FileRecord, Manifest
from nla_ray.runlog import get_logger

logger = get_logger(__name__)

_STARTED_NAME = "started.json"
"""Configuration of an artifact that is being made; gone when its manifest is there."""
_LOCK_NAME = ".lock"
_COPY_SECONDS = 60.0
_LEASE_SECONDS = 90.0
_LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "pyarrow")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """A folder or file on a pyarrow filesystem. Local paths and URIs are handled alike."""

    filesystem: pafs.FileSystem
    path: str

    @classmethod
    def of(cls, where: str | Path) -> Location:
        """From a local path or a URI (file://, s3://, gs://, hdfs://, or any fsspec scheme that is
        installed)."""
        text = str(where)
        if "://" not in text:
            return cls(pafs.LocalFileSystem(), str(Path(text).absolute()))
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            filesystem, path = _fsspec(text, error)
        return cls(filesystem, path)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}:{self.path}"

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def list_files(self) -> list[str]:
        """Paths of all files below, relative, sorted."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        start = len(self.path.rstrip("/")) + 1
        return sorted(
            info.path[start:]
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        )

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Replace the file whole: readers see the old content or the new, never a part."""
        self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
        if not self.is_local:  # an object appears when its upload completes
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)
            return
        temporary = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def write_text(self, content: str) -> None:
        self.write_bytes(content.encode())

    def delete(self) -> None:
        """Remove the file or the folder with everything in it; nothing happens when it is not
        there."""
        kind = self.filesystem.get_file_info(self.path).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def record(self) -> FileRecord:
        """Size and SHA-256 of the file."""
        digest, size = hashlib.sha256(), 0
        with self.filesystem.open_input_stream(self.path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
        return FileRecord(size=size, sha256=digest.hexdigest())


def _fsspec(uri: str, reason: Exception) -> tuple[pafs.FileSystem, str]:
    """A filesystem that pyarrow itself does not speak, through fsspec. Raises ValueError when there
    is none."""
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"run directory: got {uri!r}, expected a local path or a URI pyarrow or fsspec can open"
            f" ({reason}; {error}). Install the file system's package or use another path."
        ) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


class Stage:
    """One artifact while it is being made (or found complete)."""

    def __init__(
        self, run: Run, name: str, config: dict[str, Any], parents: Mapping[str, Manifest]
    ) -> None:
        self.run, self.name, self.config = run, name, config
        self.location = run.root / name
        self._parents = {parent: manifest.fingerprint for parent, manifest in parents.items()}
        self._hash = config_hash({"config": config, "parents": self._parents})
        self.manifest = self._existing()
        if self.manifest is None:
            self._mark_started()

    @property
    def complete(self) -> bool:
        """True: the artifact lies there, made with this configuration from these parents; skip the
        stage."""
        return self.manifest is not None

    def _existing(self) -> Manifest | None:
        manifest = self.run.find(self.name)
        if manifest is not None:
            self._require_same(manifest.config_hash, manifest.config, manifest.parents)
        return manifest

    def _mark_started(self) -> None:
        marker = self.location / _STARTED_NAME
        if marker.exists():
            started = json.loads(marker.read_text())
            self._require_same(started["config_hash"], started["config"], started["parents"])
        else:
            marker.write_text(
                json.dumps(
                    {"config_hash": self._hash, "config": self.config, "parents": self._parents},
                    indent=1,
                )
            )

    def _require_same(
        self, other_hash: str, other_config: dict[str, Any], other_parents: dict[str, str]
    ) -> None:
        if other_hash == self._hash:
            return
        changes = differences(other_config, self.config) or [
            f"parent {name}: there {other_parents.get(name)}, here {self._parents.get(name)}"
            for name in sorted({*other_parents, *self._parents})
            if other_parents.get(name) != self._parents.get(name)
        ]
        raise ValueError(
            f"artifact {self.name!r} in {self.location}: it was made with another configuration"
            f" ({'; '.join(changes[:4])}), expected the same. Repeat the flags it was made with,"
            f" use another --run-dir, or delete {self.location}."
        )

    def reopen(self) -> None:
        """Make a complete artifact one that is being made, with all that lies in it; whoever goes
        on from a file of it verifies it before."""
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
        paths = [
            path
            for path in self.location.list_files()
            if path not in (MANIFEST_NAME, _STARTED_NAME)
            and not path.startswith(("scratch/",))
            and not path.endswith(".tmp")
        ]
        manifest = Manifest(
            name=self.name,
            config=self.config,
            config_hash=self._hash,
            parents=self._parents,
            files={path: (self.location / path).record() for path in paths},
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
        """A local folder to write into, for libraries that know only paths; its files land in the
        artifact.

        On a local run it is the artifact's own folder; else what is in it is copied every minute
        and on exit, so that whoever is killed loses no more than that. What lies in `scratch/` is
        removed when the artifact is published.
        """
        if self.location.is_local:
            Path(self.location.path).mkdir(parents=True, exist_ok=True)
            yield Path(self.location.path)
            return
        with tempfile.TemporaryDirectory(prefix="nla_ray_") as folder:
            _copy(self.location, Location.of(folder))
            with _copied_on(Path(folder), self.location):
                yield Path(folder)


class Run:
    """A run directory and the configuration it is worked on with."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.root = Location.of(config.run_dir)

    def stage(
        self,
        name: str,
        *sections: str,
        parents: Mapping[str, Manifest] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> Stage:
        """Open artifact `name`, shaped by the named configuration sections and made from `parents`,
        and from files outside the run (`inputs`: name -> digest).

        Raises ValueError when what lies there has another configuration or other parents.
        """
        plain = to_dict(self.config)
        config = {section: plain[section] for section in sections} | (
            {"inputs": dict(inputs)} if inputs else {}
        )
        return Stage(self, name, config, parents or {})

    def find(self, name: str) -> Manifest | None:
        """The manifest of a complete artifact, or None."""
        path = self.root / name / MANIFEST_NAME
        return Manifest.from_json(path.read_text(), str(path)) if path.exists() else None

    def require(self, name: str, job: str) -> Manifest:
        """The manifest of artifact `name`. Raises ValueError that names the job which makes it."""
        manifest = self.find(name)
        if manifest is None:
            raise ValueError(
                f"artifact {name!r}: got none in {self.root}, expected a complete one. Make it"
                f" with: python jobs/{job}.py --preset {self.config.preset} --run-dir"
                f" {self.config.run_dir}"
            )
        return manifest

    def verified(self, name: str, manifest: Manifest, path: str) -> Location:
        """A file of an artifact, after its size and hash were compared with the manifest. Raises
        ValueError if they differ."""
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
        """A verified local folder with the artifact's files below `prefix`, for libraries that know
        only paths."""
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
        """Hold the run for this process. Raises ValueError when another process works on the same
        directory."""
        holder = _LocalLock(self.root) if self.root.is_local else _Lease(self.root)
        try:
            yield
        finally:
            holder.release()


class _LocalLock:
    """An advisory lock that the kernel drops when its process dies, however it dies."""

    def __init__(self, root: Location) -> None:
        try:
            Path(root.path).mkdir(parents=True, exist_ok=True)
            self._file = open(f"{root.path}/{_LOCK_NAME}", "a+")
        except OSError as error:
            raise ValueError(
                f"run directory {root}: got {error.strerror}, expected a folder that can be"
                " written. Choose another with --run-dir."
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise ValueError(_busy(root, self._file.read().strip())) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class _Lease:
    """The same on an object store: a file renewed every third of its validity, stale when it is not
    renewed."""

    def __init__(self, root: Location) -> None:
        self._file, self._owner = (
            root / _LOCK_NAME,
            f"process {os.getpid()} on {platform.node()} {uuid.uuid4().hex[:6]}",
        )
        if self._file.exists():
            lease = json.loads(self._file.read_text())
            if time.time() - lease["time"] < _LEASE_SECONDS:
                raise ValueError(_busy(root, lease["owner"]))
        self._renew()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        self._file.write_text(json.dumps({"owner": self._owner, "time": time.time()}))

    def _keep(self) -> None:
        while not self._stop.wait(_LEASE_SECONDS / 3):
            try:
                self._renew()
            except OSError as error:  # a store that is away for a moment must not end the renewals
                logger.warning("%s: not renewed this time: %s", self._file, error)

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        self._file.delete()


def _busy(root: Location, owner: str) -> str:
    return (
        f"run directory {root}: got a lock held by {owner or 'another process'}, expected a free"
        " one. Wait for that run, stop it, or use another --run-dir."
    )


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable differences of two nested configurations: `grpo.steps: there 80, here 20`."""
    lines = []
    for key in sorted({*there, *here}):
        if isinstance(there.get(key), dict) and isinstance(here.get(key), dict):
            lines += differences(there[key], here[key], f"{prefix}{key}.")
            continue
        old, new = (repr(one[key]) if key in one else "nothing" for one in (there, here))
        if old != new:
            lines.append(f"{prefix}{key}: there {old}, here {new}")
    return lines


def _copy(source: Location, target: Location) -> None:
    for path in source.list_files():
        (target / path).write_bytes((source / path).read_bytes())


@contextmanager
def _copied_on(folder: Path, target: Location) -> Iterator[None]:
    """Copies what changes in a local folder every _COPY_SECONDS, and what is left on exit."""
    copied = _state(folder)
    stopped = threading.Event()

    def copy() -> None:
        for path, state in _state(folder).items():
            if copied.get(path) != state:
                (target / path).write_bytes((folder / path).read_bytes())
                copied[path] = state

    def keep() -> None:
        while not stopped.wait(_COPY_SECONDS):
            try:
                copy()
            except OSError as error:  # the next round or the last one tries again
                logger.warning("%s: not copied this time: %s", target, error)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        copy()


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, by its path below the folder; files on their way to
    another name are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp")
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    }


def _environment() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
