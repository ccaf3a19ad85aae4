"""Blocks of a section as plain HTML: tables, lists, examples, and empty frames for charts.

Knows blocks, not figures. The rule it protects: whatever is not Markup is escaped, so that a text
can only become a text.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.report.rendering.content import (
    Bullets,
    Cell,
    ChartGroup,
    Column,
    Definitions,
    DrawnExamples,
    Gallery,
    ReportBlock,
    Section,
    Table,
    TableRow,
    Warnings,
    bounds,
    cell_text,
    interval,
    number,
    shows_nothing,
)
from nla_ray.report.rendering.vocabulary import spaced

_NO_GALLERY = (
    "The gallery of all texts is run by a script that is inside this file. Allow JavaScript to"
    " search it; nothing is loaded from anywhere."
)
_SHARES = 10
"""Shades of a cell of counts: `share-0` to `share-10` in page.css."""


Attributes = Mapping[str, str | float | None]


class Markup(str):
    """HTML that may stand in the page as it is."""


def tag(name: str, attributes: Attributes, *children: str) -> Markup:
    """An element; children that are not Markup are escaped, attributes that are None left out.

    >>> tag("p", {"class": "note", "title": None}, "a & b", tag("br", {}))
    '<p class="note">a &amp; b<br></p>'
    """
    given = {key: value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    inside = "".join(
        child if isinstance(child, Markup) else html.escape(child) for child in children
    )
    end = "" if name in ("br", "wbr") else f"</{name}>"
    return Markup(f"<{name}{written}>{inside}{end}")


def section_markup(section: Section, groups: Sequence[ChartGroup]) -> Markup:
    """A section as it stands on the page.

    `groups`: all charts of the page; the number of a group there leads its frame to its data.
    """
    parts = [tag("h2", {}, section.title)]
    introduced = " ".join(part for part in (section.intro, section.how_to_read) if part)
    if introduced:
        parts.append(tag("p", {}, introduced))
    for block in section.blocks:
        parts += _block_markup(block, section, groups)
    return tag("section", {"id": section.id}, *parts)


def _block_markup(
    block: ReportBlock, section: Section, groups: Sequence[ChartGroup]
) -> list[Markup]:
    if isinstance(block, Table):
        return [] if block.only == "text" else [_chosen(block.choice, _table_block(block, section))]
    if isinstance(block, ChartGroup):
        number = next(index for index, group in enumerate(groups) if group is block)
        frame = tag("div", {"class": "charts", "data-group": number, "hidden": ""})
        return [_chosen(block.choice, frame)]
    if isinstance(block, Warnings):
        return [tag("p", {"class": "warning"}, line) for line in block.lines]
    if isinstance(block, Bullets):
        return [tag("ul", {}, *(tag("li", {}, line) for line in block.lines))]
    if isinstance(block, Definitions):
        entries = [
            part
            for term, meaning in block.entries
            for part in (tag("dt", {}, term), tag("dd", {}, meaning))
        ]
        return [tag("dl", {}, *entries)]
    if isinstance(block, DrawnExamples):
        return [_example(example) for example in block.examples]
    assert isinstance(block, Gallery)
    return [tag("noscript", {}, tag("p", {"class": "warning"}, _NO_GALLERY)), _keys_of_gallery()]


def _chosen(choice: Mapping[str, str], content: Markup) -> Markup:
    """A block that the page's script shows and hides by what is chosen."""
    data = json.dumps(dict(choice)) if choice else None
    return tag("div", {"class": "block", "data-choice": data}, content)


# Tables -------------------------------------------------------------------------------------------


def _table_block(table: Table, section: Section) -> Markup:
    """A table in a frame that scrolls by itself, with keys too, so that the page never does."""
    frame = {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": table.title}
    scrolling = tag("div", frame, _table(table))
    if table.is_folded:
        return tag("details", {}, tag("summary", {}, f"Numbers: {table.title}"), scrolling)
    if table.title == section.title:
        return scrolling
    return Markup(tag("h3", {}, table.title) + scrolling)


def _table(table: Table) -> Markup:
    heads = [tag("th", {"scope": "col"}, table.head)]
    heads += [_column_head(column, table) for column in table.columns]
    axes = [_axis(table, index) for index in range(len(table.columns))]
    rows = []
    for row in table.rows:
        cells = [tag("th", {"scope": "row"}, _breakable(row.title))]
        for column, cell, axis in zip(table.columns, row.cells, axes, strict=True):
            cells.append(_cell(column, cell, axis, table, row))
        classes = "quiet" if row.is_control else None
        rows.append(tag("tr", {"class": classes, "data-row": row.name}, *cells))
    head = tag("thead", {}, tag("tr", {}, *heads))
    return tag("table", {"class": table.look}, head, tag("tbody", {}, *rows))


def _column_head(column: Column, table: Table) -> Markup:
    attributes = {
        "scope": "col",
        "data-column": column.name,
        "class": None if column.is_main else "more",
        "title": column.definition or None,
    }
    title = tag("span", {}, column.title) if table.look == "counts" else column.title
    return tag("th", attributes, title)


def _cell(
    column: Column, cell: Cell, axis: tuple[float, float], table: Table, row: TableRow
) -> Markup:
    attributes: dict[str, str | float | None] = {
        "data-column": column.name,
        "class": None if column.is_main else "more",
    }
    if table.look == "counts":
        return _count(attributes, column, cell, row)
    if isinstance(cell, bool):
        return tag("td", attributes, _badge(cell))
    if shows_nothing(cell):
        return tag("td", attributes, "–")
    if not isinstance(cell, Mapping):
        return tag("td", attributes, cell_text(cell))
    attributes["data-value"] = json.dumps(cell["value"])
    if "families" in cell:
        attributes["title"] = f"n {cell['n']}, {cell['families']} families"
    if table.look != "figures":
        return tag("td", attributes, interval(cell))
    value = tag("span", {"class": "value"}, number(cell["value"]))
    if cell.get("low") is None:
        return tag("td", attributes, value)
    around = tag("span", {"class": "range"}, bounds(cell))
    return tag("td", attributes, value, " ", around, _interval_drawing(cell, axis, column.chance))


def _badge(passed: bool) -> Markup:
    if passed:
        return tag("span", {"class": "badge pass"}, "✓ PASS")
    return tag("span", {"class": "badge fail"}, "✗ FAIL")


def _count(attributes: Attributes, column: Column, cell: Cell, row: TableRow) -> Markup:
    """A count, shaded by its share of the row."""
    count = cell if isinstance(cell, int) else 0
    total = sum(counted for counted in row.cells if isinstance(counted, int))
    classes = f"share-{round(_SHARES * count / (total or 1))}"
    if column.name == row.name:
        classes += " right"
    title = f"{count} of {total} {row.title} named {column.title}"
    return tag("td", {**attributes, "class": classes, "title": title}, str(count or "·"))


def _axis(table: Table, index: int) -> tuple[float, float]:
    """The least and the most of a column's intervals and chance."""
    column, values = table.columns[index], []
    for row in table.rows:
        cell = row.cells[index]
        if isinstance(cell, Mapping):
            values += [cell.get(key) for key in ("value", "low", "high")]
    numbers = [value for value in [column.chance, *values] if value is not None]
    finite = [number for number in numbers if math.isfinite(number)]
    least, most = min(finite, default=0.0), max(finite, default=1.0)
    space = 0.0 if most > least else abs(most) * 0.1 or 0.5
    return least - space, most + space


def _interval_drawing(
    figure: Mapping[str, Any], axis: tuple[float, float], chance: float | None
) -> Markup:
    """One interval on the axis of its column."""

    def x(value: float) -> str:
        return f"{5 + (value - axis[0]) / (axis[1] - axis[0]) * 86:.1f}"

    def line(start: str, top: float, end: str, bottom: float, name: str) -> Markup:
        return tag("line", {"x1": start, "y1": top, "x2": end, "y2": bottom, "class": name})

    lines = [line("0", 6, "96", 6, "grid")]
    if chance is not None:
        lines.append(line(x(chance), 0, x(chance), 12, "chance"))
    lines.append(line(x(figure["low"]), 6, x(figure["high"]), 6, "interval"))
    lines.append(line(x(figure["value"]), 1.5, x(figure["value"]), 10.5, "point"))
    frame = {"viewBox": "0 0 96 12", "class": "cell-interval", "aria-hidden": "true"}
    return tag("svg", frame, *lines)


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots, not inside its words."""
    parts = [html.escape(name)]
    if " " not in name:
        for sign in (".", "-", "_", "/"):
            parts = [part.replace(sign, f"{sign}<wbr>") for part in parts]
    return Markup("".join(parts))


# Texts --------------------------------------------------------------------------------------------


def _example(example: Mapping[str, Any]) -> Markup:
    head = tag(
        "header",
        {},
        tag("strong", {}, spaced(example["domain"])),
        tag("code", {}, example["activation_id"]),
    )
    sides = [tag("pre", {"class": "source"}, example["text"])]
    for name, description in example["descriptions"].items():
        said = [tag("h3", {}, spaced(name)), tag("pre", {}, description or "(empty)")]
        sides.append(tag("div", {"class": "said", "data-verbalizer": name}, *said))
    return tag("article", {"class": "card"}, head, tag("div", {"class": "sides"}, *sides))


def _keys_of_gallery() -> Markup:
    found = tag("mark", {"class": "found"}, "found in the text")
    missing = tag("mark", {"class": "missing"}, "not found")
    keys = [tag("kbd", {}, key) for key in ("/", "j", "k", "Esc")]
    return tag(
        "p",
        {"class": "script"},
        *("Words that a description claims: ", found, ", ", missing, ". Keys: "),
        *(keys[0], " search, ", keys[1], " and ", keys[2], " next and previous, ", keys[3]),
        " from the search to the list.",
    )
