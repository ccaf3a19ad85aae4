"""One process works in a folder at a time, a run or a store: by a lock of the kernel, or a lease.

It protects the rule that a process that died holds nothing: the kernel drops its lock, and a lease
that is not renewed is stale.
"""

from __future__ import annotations

import _thread
import fcntl
import json
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_ray.run.location import Location
from nla_ray.run.log import get_logger

logger = get_logger(__name__)

_LOCK_NAME, _CLAIMS_NAME = ".lock", ".claims"
_LEASE_SECONDS = 90.0
"""How long a lease is valid; it is renewed every third of this time."""


def take_lock(
    root: Location, name: str = "run directory", flag: str = "--run-dir"
) -> LocalLock | Lease:
    """Hold a folder for this process, until `release`.

    `name` and `flag`: what errors call it, and the setting that names another. Raises ValueError
    while another process has it.
    """
    return (LocalLock if root.is_local else Lease)(root, name, flag)


class LocalLock:
    """An advisory lock that the kernel drops when its process dies, however it dies."""

    def __init__(
        self, root: Location, name: str = "run directory", flag: str = "--run-dir"
    ) -> None:
        try:
            Path(root.path).mkdir(parents=True, exist_ok=True)
            # Open as long as the lock is held.
            self._file = open(f"{root.path}/{_LOCK_NAME}", "a+")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"{name} {root}: got {error.strerror}, expected a folder that can be written."
                f" Choose another with {flag}."
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with self._file:
                self._file.seek(0)
                owner = self._file.read().strip()
            raise ValueError(_busy(root, owner, name, flag)) from None
        self._file.truncate(0)
        self._file.write(_this_process())
        self._file.flush()

    def release(self) -> None:
        """Give the folder back."""
        self._file.close()


class Lease:
    """The same on an object store: a claim, in a file of its own, that no other process has.

    pyarrow writes to no store under a condition: of S3's header If-None-Match it says nothing and
    sends nothing. So a common file could be taken by two processes at once. Instead a process
    writes its claim first and lists all claims then; who sees another that is alive withdraws. S3,
    GCS and Azure list what was written before, so of two processes at least one sees the other:
    never do both hold the run. (Both may withdraw, when they start at the same moment.) A claim is
    alive for _LEASE_SECONDS from its renewal, by clocks that must agree within a minute.

    Who holds the run gives it up to no claim that came later and is not renewed, as long as its own
    is valid: the other one is about to be refused, or was killed as it started. What no lease can
    do: a process that was frozen for longer than its claim is valid may finish the one write that
    it was in. It stops at its next renewal, when it sees who has taken over.
    """

    def __init__(
        self, root: Location, name: str = "run directory", flag: str = "--run-dir"
    ) -> None:
        self._claims = root / _CLAIMS_NAME
        self._name = f"{uuid.uuid4().hex}.json"
        try:
            self._renew()
            if others := self._others():
                raise ValueError(_busy(root, _owner_of(others), name, flag))
        except BaseException:  # also Ctrl-C: a claim that nobody holds would refuse the next start
            (self._claims / self._name).delete()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        claim = {"owner": _this_process(), "time": time.time()}
        (self._claims / self._name).write_text(json.dumps(claim))
        self._renewed = claim["time"]

    def _may_be_lost(self) -> bool:
        """Whether another process could have taken this one for dead."""
        is_stale = time.time() - self._renewed >= _LEASE_SECONDS
        return is_stale or not (self._claims / self._name).exists()

    def _others(self) -> dict[str, dict[str, Any]]:
        """The other claims that are alive, by name; those of the dead are removed."""
        alive = {}
        for name in self._claims.list_files():
            if name == self._name:
                continue
            try:
                claim = json.loads((self._claims / name).read_text())
            except OSError:
                if (self._claims / name).exists():
                    raise
                continue  # withdrawn meanwhile
            except ValueError:  # being written
                claim = {"owner": "", "time": math.inf}
            if time.time() - claim["time"] < _LEASE_SECONDS:
                alive[name] = claim
            else:
                (self._claims / name).delete()
        return alive

    def _keep_renewing(self) -> None:
        seen: dict[str, dict[str, Any]] = {}
        while not self._stop.wait(_LEASE_SECONDS / 3):
            try:
                others, may_be_lost = self._others(), self._may_be_lost()
                # One that renews its claim holds the run: who is refused, or killed, never does.
                holders = {
                    name: claim
                    for name, claim in others.items()
                    if may_be_lost or claim["time"] > seen.get(name, claim)["time"]
                }
                if holders:
                    owner = _owner_of(holders)
                    logger.error("%s: taken over by %s; this job stops", self._claims, owner)
                    _thread.interrupt_main()
                    return
                seen = others
                self._renew()
            except OSError as error:  # a store that is away for a moment must not end the renewals
                logger.warning("%s: not renewed this time: %s", self._claims, error)

    def release(self) -> None:
        """Give the folder back."""
        self._stop.set()
        self._thread.join()
        (self._claims / self._name).delete()


def _owner_of(claims: Mapping[str, Mapping[str, Any]]) -> str:
    return next(iter(claims.values()))["owner"]


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _busy(root: Location, owner: str, name: str, flag: str) -> str:
    return (
        f"{name} {root}: got a lock held by {owner or 'another process'}, expected a free one. Wait"
        f" for that run, stop it, or use another {flag}."
    )
