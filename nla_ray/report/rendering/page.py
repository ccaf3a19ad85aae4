"""The report as one page for people: a file that opens anywhere and asks the network for nothing.

Writes every section as plain HTML, so that all tables can be read without scripts. The page's own
script draws charts from the data beside them, sorts and filters tables, and runs the gallery. The
rule it protects: no text of a corpus or a model can end a script, become markup, or load anything;
the page's content security policy names its own script and style by digest and allows nothing else.
Charts are inline SVG from a small script: a chart library would add 3-4 MB to every report.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.rendering.content import ChartGroup, Section, Table
from nla_ray.report.rendering.elements import Markup, section_markup, tag
from nla_ray.report.rendering.rows import judge_first, keys_of
from nla_ray.report.rendering.sections import gates_passed, opening, sections
from nla_ray.report.rendering.vocabulary import title_of

SCRIPTS = ("charts.mjs", "tables.mjs", "gallery.mjs", "page.mjs")
"""In this order they make one script."""
_FIELD = re.compile(r"\{\{(\w+)\}\}")
_IMPORT = re.compile(r"^import .*?;\n", re.MULTILINE | re.DOTALL)
_EXPORT = re.compile(r"^export (default )?", re.MULTILINE)


def to_html(
    report: Mapping[str, Any],
    gallery: Sequence[Mapping[str, Any]],
    training: Mapping[str, Sequence[Mapping[str, float]]],
) -> str:
    """The page of one report.

    `gallery`: one row for each activation, with its text and what every verbalizer said of it, in
    segments that are marked "found", "missing" or "". `training`: records of metrics.jsonl by
    artifact. Values that are not finite are shown as missing. Report and training stand in the page
    as they are, too: a page that travels alone can be read by programs.
    """
    style, script = _read("page.css"), joined_scripts()
    shown = sections(report, training, gallery)
    groups = [
        block for section in shown for block in section.blocks if isinstance(block, ChartGroup)
    ]
    title = f"Report of {report['preset']}"
    parts = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "policy": (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src"
            f" '{_digest(script)}'"
        ),
        "navigation": _navigation(shown),
        "opening": _opening(report),
        "sections": "\n".join(section_markup(section, groups) for section in shown),
        "report": _embedded(report),
        "gallery": _embedded(gallery),
        "training": _embedded(training),
        "charts": _embedded(
            {
                "names": _names(report, training),
                "titles": _titles(shown),
                "groups": [dataclasses.asdict(group) for group in groups],
            }
        ),
    }
    # One pass: what is put in is never searched for fields again.
    return _FIELD.sub(lambda field: parts[field[1]], _read("page.html"))


def joined_scripts() -> str:
    """The modules of SCRIPTS as one: without the lines by which they find each other."""
    modules = [_EXPORT.sub("", _IMPORT.sub("", _read(name))) for name in SCRIPTS]
    return "\n".join(modules)


def _names(
    report: Mapping[str, Any], training: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, list[str]]:
    """Who speaks and who scores: what the script gives colours to."""
    results = report["results"]
    return {
        "verbalizers": list(dict.fromkeys([*results, *(name for name in training)])),
        "controls": list(CONTROLS),
        "scorers": judge_first(keys_of(results.values())),
    }


def _titles(shown: Sequence[Section]) -> dict[str, str]:
    """What the options of the reader's choices are called."""
    blocks = [block for section in shown for block in section.blocks]
    chosen = [block.choice for block in blocks if isinstance(block, Table | ChartGroup)]
    return {option: title_of(option) for choice in chosen for option in choice.values()}


def _navigation(shown: Sequence[Section]) -> Markup:
    links = [tag("a", {"href": f"#{section.id}"}, section.name) for section in shown]
    return Markup("\n".join(links))


def _opening(report: Mapping[str, Any]) -> Markup:
    lines = tag("ul", {"class": "opening"}, *(tag("li", {}, line) for line in opening(report)))
    passed, gates = gates_passed(report)
    if not gates:
        return lines
    badge = tag("span", {"class": "badge pass"}, "✓ PASS")
    if passed < gates:
        badge = tag("span", {"class": "badge fail"}, "✗ FAIL")
    verdict = tag("p", {"class": "verdict"}, badge, f" {passed} of {gates} gates passed")
    return Markup(lines + verdict)


def _read(name: str) -> str:
    return files("nla_ray.report.rendering").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in.

    `<` occurs only inside strings, where it may be escaped.
    """
    written = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    return written.replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
