"""What was tried on validation activations before a preset's settings were chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def experiments(name: str) -> list[dict[str, Any]]:
    """What was tried on validation activations before the settings of preset `name` were chosen;
    empty where nothing was.

    Rows of `changed` (in words), `kept`, `n` (activations) and `minus_sft` (figure -> paired
    difference with the SFT verbalizer).
    """
    path = Path(__file__).parent / f"{name}_experiments.json"
    return json.loads(path.read_text()) if path.exists() else []
