"""The folder `nla_ray/cards`: what is known of each preset beyond the report of one run.

`{preset}_experiments.json` and `findings/{preset}.md` are written by people and read here;
`{preset}.md`, the card, is written here and by nobody else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "cards"


def experiments(preset: str) -> list[dict[str, Any]]:
    """What was tried on validation before the settings of a preset were chosen; or nothing.

    Rows of `changed` (in words), `kept`, `n` (activations) and `minus_sft` (figure -> paired
    difference with the SFT verbalizer).
    """
    path = FOLDER / f"{preset}_experiments.json"
    return json.loads(path.read_text()) if path.exists() else []


def findings(preset: str) -> str:
    """What people found out about a preset, as Markdown; empty where nothing is written."""
    path = FOLDER / "findings" / f"{preset}.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def write_card(preset: str, card: str) -> Path:
    """Write a preset's card into the package; returns where it lies."""
    path = FOLDER / f"{preset}.md"
    path.write_text(card, encoding="utf-8")
    return path
