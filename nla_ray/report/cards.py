"""The folder `nla_ray/cards`: what is known of each preset beyond the report of one run.

`{preset}_experiments.json` and `findings/{preset}.md` are written by people and read here;
`{preset}.md`, the card, is written here and by nobody else. A preset in a file has none of these:
its path leads elsewhere, and RunConfig refuses its card.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_ray.settings.config import is_preset_file

FOLDER = Path(__file__).resolve().parent.parent / "cards"


def experiments(preset: str) -> list[dict[str, Any]]:
    """What was tried on validation before the settings of a preset were chosen; or nothing.

    Rows of `changed` (in words), `kept`, `n` (activations) and `minus_sft` (figure -> paired
    difference with the SFT verbalizer); where other seeds were trained, `other_seeds`, a mapping
    figure -> difference for each. Every row gets `seeds`, their number, and `spread`: figure ->
    standard deviation over the seeds.
    """
    path = FOLDER / f"{preset}_experiments.json"
    is_known = not is_preset_file(preset) and path.exists()
    rows = json.loads(path.read_text()) if is_known else []
    return [{**row, **_over_seeds(row)} for row in rows]


def _over_seeds(row: Mapping[str, Any]) -> dict[str, Any]:
    others = row.get("other_seeds", [])
    spread = {}
    for figure, difference in row["minus_sft"].items():
        values = [difference["value"], *(other[figure] for other in others)]
        if others:
            spread[figure] = statistics.stdev(values)
    return {"seeds": 1 + len(others), "spread": spread}


def findings(preset: str) -> str:
    """What people found out about a preset, as Markdown; empty where nothing is written."""
    path = FOLDER / "findings" / f"{preset}.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def write_card(preset: str, card: str, picture: str = "") -> Path:
    """Write a preset's card, and its picture, into the package; returns where the card lies."""
    shown = FOLDER / picture_name(preset)
    shown.unlink(missing_ok=True)
    if picture:
        shown.write_text(picture, encoding="utf-8")
    path = FOLDER / f"{preset}.md"
    path.write_text(card, encoding="utf-8")
    return path


def picture_name(preset: str) -> str:
    """The file beside a card that its picture is in."""
    return f"{preset}.svg"
