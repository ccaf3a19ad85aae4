"""A file or folder on a local disk or an object store, and copies that follow changes.

It protects the rule that a reader sees a file whole or not at all. It knows no artifact.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow.fs as pafs

from nla_ray.run.log import get_logger
from nla_ray.run.manifest import FileRecord

logger = get_logger(__name__)

_COPY_SECONDS = 60.0
"""Seconds between two copies of a local folder that belongs to a store."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """A folder or file on a pyarrow filesystem; local paths and URIs are handled alike.

    >>> str(Location.of("/runs") / "nano")
    '/runs/nano'
    """

    filesystem: pafs.FileSystem
    path: str

    @classmethod
    def of(cls, path_or_uri: str | Path) -> Location:
        """From a local path or a URI: file://, s3://, gs://, hdfs://, or a scheme of fsspec.

        Raises ValueError for a scheme that neither pyarrow nor fsspec speaks.
        """
        text = str(path_or_uri)
        if "://" not in text:
            return cls(pafs.LocalFileSystem(), str(Path(text).absolute()))
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            filesystem, path = _through_fsspec(text, error)
        return cls(filesystem, path)

    @property
    def is_local(self) -> bool:
        """Whether libraries that know only paths can open it."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}:{self.path}"

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
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
        """The file's content."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_text(self) -> str:
        """The file's content, as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Replace the file whole: readers see the old content or the new, never a part."""
        if self.is_local:
            with self.replacement() as file:
                file.write(content)
            return
        self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(content)  # an object appears when its upload completes

    @contextmanager
    def replacement(self) -> Iterator[BinaryIO]:
        """A file to write piece by piece, which replaces this one whole when all is written.

        It is on a local disk until then. An error leaves what was there.
        """
        self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
        if not self.is_local:
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                with self.filesystem.open_output_stream(self.path) as stream:
                    while block := file.read(_BLOCK_BYTES):
                        stream.write(block)
            return
        temporary = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def write_text(self, content: str) -> None:
        """Replace the file whole, as UTF-8."""
        self.write_bytes(content.encode())

    def delete(self) -> None:
        """Remove the file, or the folder with everything in it; what does not exist is no error."""
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


def _through_fsspec(uri: str, reason: Exception) -> tuple[pafs.FileSystem, str]:
    """A filesystem that pyarrow itself does not speak."""
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"run directory: got {uri!r}, expected a local path or a URI pyarrow or fsspec can open"
            f" ({reason}; {error}). Install the file system's package or use another path."
        ) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def copy_files(source: Location, target: Location) -> None:
    """Copy every file of a folder."""
    for path in source.list_files():
        (target / path).write_bytes((source / path).read_bytes())


@contextmanager
def mirror_folder(folder: Path, target: Location) -> Iterator[None]:
    """Copy what changes in a local folder every _COPY_SECONDS, and what is left on exit.

    What was removed from it is removed there.
    """
    states = _file_states(folder)
    stopped = threading.Event()

    def copy_changes() -> None:
        current = _file_states(folder)
        for path, state in current.items():
            if states.get(path) != state:
                (target / path).write_bytes((folder / path).read_bytes())
                states[path] = state
        for path in set(states) - set(current):
            (target / path).delete()
            del states[path]

    def keep_copying() -> None:
        while not stopped.wait(_COPY_SECONDS):
            try:
                copy_changes()
            except OSError as error:  # the next round tries again
                logger.warning("%s: not copied this time: %s", target, error)

    thread = threading.Thread(target=keep_copying, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        copy_changes()


def _file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, by its path; half-written files are left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp")
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    }
