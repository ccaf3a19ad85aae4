"""Rows of the user's that are left out: each with its line and its reason, written and counted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One row that is left out.

    Example:
        Reject(source="texts.jsonl", line=17, reason="missing field")
    """

    source: str
    line: int
    """Counted from 1; 0 stands for a whole file."""
    reason: str


class RejectsFile:
    """Rejects, one JSON object a line, and their number by reason. A context manager."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> RejectsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, reject: Reject) -> None:
        """Write one line. Reasons that name an id are counted under their first words."""
        self.counts[reject.reason.split(" doc_id ")[0]] += 1
        self._file.write(json.dumps(dataclasses.asdict(reject)) + "\n")

    def describe(self) -> str:
        """For people: `3 rejected (2 empty, 1 not UTF-8)`."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{sum(self.counts.values())} rejected" + (f" ({reasons})" if reasons else "")
