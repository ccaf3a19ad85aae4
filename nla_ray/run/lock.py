"""One process works on a run directory at a time: by a lock of the kernel, or by a lease.

It protects the rule that a process that died holds nothing: the kernel drops its lock, and a lease
that is not renewed is stale.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path

from nla_ray.run.location import Location
from nla_ray.run.log import get_logger

logger = get_logger(__name__)

_LOCK_NAME = ".lock"
_LEASE_SECONDS = 90.0
"""How long a lease is valid; it is renewed every third of this time."""


class LocalLock:
    """An advisory lock that the kernel drops when its process dies, however it dies."""

    def __init__(self, root: Location) -> None:
        try:
            Path(root.path).mkdir(parents=True, exist_ok=True)
            # Open as long as the lock is held.
            self._file = open(f"{root.path}/{_LOCK_NAME}", "a+")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"run directory {root}: got {error.strerror}, expected a folder that can be"
                " written. Choose another with --run-dir."
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with self._file:
                self._file.seek(0)
                owner = self._file.read().strip()
            raise ValueError(_busy(root, owner)) from None
        self._file.truncate(0)
        self._file.write(_this_process())
        self._file.flush()

    def release(self) -> None:
        """Give the run directory back."""
        self._file.close()


class Lease:
    """The same on an object store: a file that says who works here, and since when."""

    def __init__(self, root: Location) -> None:
        self._file = root / _LOCK_NAME
        self._owner = f"{_this_process()} {uuid.uuid4().hex[:6]}"
        if self._file.exists():
            lease = json.loads(self._file.read_text())
            if time.time() - lease["time"] < _LEASE_SECONDS:
                raise ValueError(_busy(root, lease["owner"]))
        self._renew()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        self._file.write_text(json.dumps({"owner": self._owner, "time": time.time()}))

    def _keep_renewing(self) -> None:
        while not self._stop.wait(_LEASE_SECONDS / 3):
            try:
                self._renew()
            except OSError as error:  # a store that is away for a moment must not end the renewals
                logger.warning("%s: not renewed this time: %s", self._file, error)

    def release(self) -> None:
        """Give the run directory back."""
        self._stop.set()
        self._thread.join()
        self._file.delete()


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _busy(root: Location, owner: str) -> str:
    return (
        f"run directory {root}: got a lock held by {owner or 'another process'}, expected a free"
        " one. Wait for that run, stop it, or use another --run-dir."
    )
