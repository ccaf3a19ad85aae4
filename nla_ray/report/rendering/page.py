"""The report as one page for people: a file that opens anywhere, asks the network for nothing, and
hides no number.

Puts the report's dictionary, the gallery and the training records as JSON into a page whose own
script draws them, so that every figure shown is the one of report.json. It computes nothing. Charts
are inline SVG from a small script beside this module: a chart library would add 3-4 MB to every
report and bring colours and fonts of its own. The rule it protects: no text of a corpus or a model
can end a script, become markup, or load anything; the page's content security policy names its own
script and style by digest and allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.rendering.tables import CLAIM_TITLES, DEFINITIONS, METRIC_TITLES

SCRIPTS = ("page_charts.js", "page_figures.js", "page_gallery.js", "page.js")
"""In this order they make one script."""
_TITLES = {**METRIC_TITLES, **CLAIM_TITLES}
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def to_html(
    report: Mapping[str, Any],
    gallery: Sequence[Mapping[str, Any]],
    training: Mapping[str, Sequence[Mapping[str, float]]],
) -> str:
    """The page of one report.

    `gallery`: one row for each activation, with its text and what every verbalizer said of it, in
    segments that are marked "found", "missing" or "". `training`: records of metrics.jsonl by
    artifact. Values that are not finite are shown as missing.
    """
    style, script = _read("page.css"), "\n".join(_read(name) for name in SCRIPTS)
    parts = {
        "title": html.escape(f"Report of {report['preset']}"),
        "style": style,
        "script": script,
        "policy": (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src"
            f" '{_digest(script)}'"
        ),
        "report": _embedded(report),
        "gallery": _embedded(gallery),
        "training": _embedded(training),
        "definitions": "\n".join(
            f"<dt>{html.escape(_TITLES.get(name, name))}</dt><dd>{html.escape(meaning)}</dd>"
            for name, meaning in DEFINITIONS.items()
        ),
        "vocabulary": _embedded(
            {"titles": _TITLES, "controls": CONTROLS, "definitions": DEFINITIONS}
        ),
    }
    # One pass: what is put in is never searched for places again.
    return _PLACE.sub(lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in: `<` occurs only inside strings, where
    it may be escaped."""
    return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
