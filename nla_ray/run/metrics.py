"""A file of metrics, one JSON object a line.

It protects the rule that the file can always be read, however its writer died.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
"""What a training stage wrote down step by step, inside its artifact."""


class MetricsLog:
    """A file of metrics whose writer may be killed at any time.

    A torn last line is skipped by readers; the next writer cuts it off before it appends.

    Example: `log.append({"step": 3, "loss": 2.5})` writes `{"step": 3, "loss": 2.5}`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._is_whole = False

    def append(self, metrics: dict[str, Any]) -> None:
        """Write one object and hand it to the operating system."""
        if not self._is_whole and self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
        self._is_whole = True
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, oldest first. Raises ValueError for a damaged one."""
        if not self.path.exists():
            return []
        # Text after the last line break is torn, or empty.
        *lines, _ = self.path.read_text().split("\n")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                raise ValueError(
                    f"{self.path}, line {number}: got {line[:40]!r}, expected one JSON object a"
                    " line. The file is damaged; delete it, or the artifact it belongs to."
                ) from None
        return records

    def rewind(self, key: str, last: float) -> None:
        """Drop the records whose `key` is above `last`; records without the key stay.

        A run that resumes from step `last` writes them again.
        """
        kept = [record for record in self.read() if record.get(key, last) <= last]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
