"""What teachers on the network answered: written down, synced, and never asked again.

A folder, or a prefix of an object store, of JSON lines. Every process appends to files of its own,
so a line that a crash has torn is the last of its file, and is left out. Three kinds of line:
`sent`, before a request; then `failed`, or `answer`, final for its key. A request that was sent and
has no outcome was under way in a crash: it may have been billed, and is counted as if it were.

The key of an answer is the hash of all that shapes it: the text up to the position, the teacher,
the prompt and the parameters. So answers serve every run, base and layer. Protects two rules: an
answer counts when it is on the disk, and no key is answered twice.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from nla_ray.run.identity import text_hash
from nla_ray.run.location import Location
from nla_ray.run.lock import take_lock
from nla_ray.run.log import get_logger

logger = get_logger(__name__)

_KEY_CHARS = 32
"""128 bits: among a billion answers no two are alike by chance."""
_OFFSET_BITS = 40


def answer_key(text: str, teacher: str, prompt_sha256: str, parameters: Mapping[str, Any]) -> str:
    """The key of a teacher's answer about a text; `teacher` names provider, model and address."""
    content = json.dumps([text, teacher, prompt_sha256, dict(sorted(parameters.items()))])
    return text_hash(content)[:_KEY_CHARS]


@dataclass(frozen=True, kw_only=True)
class StoredAnswer:
    """What a teacher answered, final for its key.

    Example: StoredAnswer(key="9f86...", teacher="openai:gpt-6-sol", prompt_sha256="5f1c...",
    parameters={"answer_tokens": 2000}, text_sha256="2c26...", text_chars=811, text="- a licence",
    fault="", input_tokens=310, output_tokens=12, usd=0.00074)
    """

    key: str
    teacher: str
    prompt_sha256: str
    parameters: dict[str, Any]
    text_sha256: str
    """Of the text that the teacher saw, up to the position."""
    text_chars: int
    """Characters of it."""
    text: str
    """The answer."""
    fault: str
    """Why it is no label; empty: it is one."""
    input_tokens: int | None
    output_tokens: int | None
    usd: float
    """What it cost; 0 where the price is not known."""


@dataclass(frozen=True, kw_only=True)
class SentRequest:
    """A request that is about to be sent, and the most that it may cost."""

    key: str
    usd: float


@dataclass(frozen=True, kw_only=True)
class FailedRequest:
    """A request without an answer, why, and the most that it may have cost."""

    key: str
    reason: str
    usd: float


StoreRecord = SentRequest | FailedRequest | StoredAnswer
_KINDS = {SentRequest: "sent", FailedRequest: "failed", StoredAnswer: "answer"}


class AnswerStore:
    """The answers of a folder or a URI, for one process at a time.

    `run`: names who pays for what is sent now. Use it in a with-block, or close it. Raises
    ValueError while another process has the store.
    """

    def __init__(self, location: Location, run: str) -> None:
        self.location, self.run = location, run
        self._lock = take_lock(location, "label.store", "--label.store")
        self._temporary = None if location.is_local else tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name if self._temporary else location.path)
        self._files: list[str] = []
        self._index: dict[bytes, int] = {}
        """Key -> number of the file, and the offset of the line in it."""
        self._pending: dict[tuple[str, str], list[float]] = defaultdict(list)
        """(run, key) -> bounds of requests without an outcome."""
        self._spent: Counter[str] = Counter()
        self._counting = threading.Lock()
        """Held where pending and spent are changed or read: `write` may run in another thread."""
        self.torn_lines = 0
        self._session = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"
        self._own: BinaryIO | None = None
        self._writes = 0
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the store back."""
        if self._own is not None:
            self._own.close()
        if self._temporary is not None:
            self._temporary.cleanup()
        self._lock.release()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._index

    def get(self, key: str) -> StoredAnswer | None:
        """The answer of a key, or None."""
        place = self._index.get(bytes.fromhex(key))
        if place is None:
            return None
        name = self._files[place >> _OFFSET_BITS]
        with (self._folder / name).open("rb") as file:
            file.seek(place & ((1 << _OFFSET_BITS) - 1))
            record = json.loads(file.readline())
        return StoredAnswer(**{name: record[name] for name in StoredAnswer.__dataclass_fields__})

    @property
    def spent_usd(self) -> float:
        """What this run's requests cost, at most: outcomes, and requests without one."""
        with self._counting:
            return self._spent[self.run] + sum(self._unsettled())

    @property
    def num_unsettled(self) -> int:
        """Requests of this run that have no outcome: under way now, or in a crash."""
        with self._counting:
            return len(self._unsettled())

    def _unsettled(self) -> list[float]:
        """Bounds of this run's requests that have no outcome."""
        pending = self._pending.items()
        return [usd for (run, _), bounds in pending if run == self.run for usd in bounds]

    def write(self, records: Sequence[StoreRecord]) -> None:
        """Write records and sync them; they count when this returns.

        Raises RuntimeError for a second answer of a key.
        """
        lines = [self._line(record) for record in records]
        if self._own is None:
            name = f"{self._session}.jsonl"
            self._own = (self._folder / name).open("ab")
            _sync_folder(self._folder)
            self._files.append(name)
        offset = self._own.tell()
        self._own.write(b"".join(lines))
        self._own.flush()
        if self.location.is_local:
            os.fsync(self._own.fileno())
        else:
            name = f"{self._session}-{self._writes:07d}.jsonl"
            (self.location / name).write_bytes(b"".join(lines))
        self._writes += 1
        with self._counting:
            for line in lines:
                self._take(json.loads(line), len(self._files) - 1, offset)
                offset += len(line)

    def _line(self, record: StoreRecord) -> bytes:
        if isinstance(record, StoredAnswer) and record.key in self:
            raise RuntimeError(f"store {self.location}: key {record.key} is answered already")
        values = {"kind": _KINDS[type(record)], "run": self.run, **asdict(record)}
        if not isinstance(record, SentRequest):
            values["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps(values).encode() + b"\n"

    def _load(self) -> None:
        names = [name for name in self.location.list_files() if name.endswith(".jsonl")]
        for name in names:
            if not self.location.is_local:
                (self._folder / name).write_bytes((self.location / name).read_bytes())
            self._files.append(name)
            with (self._folder / name).open("rb") as file:
                self._take_lines(file, len(self._files) - 1)
        if self.torn_lines:
            logger.warning("store %s: %d torn lines left out", self.location, self.torn_lines)

    def _take_lines(self, lines: Iterable[bytes], file: int) -> None:
        offset = 0
        for line in lines:
            record = _parse_line(line)
            if record is None:
                self.torn_lines += 1
            else:
                self._take(record, file, offset)
            offset += len(line)

    def _take(self, record: Mapping[str, Any], file: int, offset: int) -> None:
        """Add a record to what is known."""
        name = (record["run"], record["key"])
        if record["kind"] == "sent":
            self._pending[name].append(record["usd"])
            return
        if bounds := self._pending.get(name):
            bounds.pop()
            if not bounds:
                del self._pending[name]
        self._spent[record["run"]] += record["usd"]
        if record["kind"] == "answer":
            place = file << _OFFSET_BITS | offset
            self._index.setdefault(bytes.fromhex(record["key"]), place)


def _sync_folder(folder: Path) -> None:
    """See to it that a new file is found after a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that a crash has torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        bytes.fromhex(record["key"])
        return record if {"kind", "run", "usd"} <= record.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
