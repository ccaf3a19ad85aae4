"""What a report consists of: sections of tables, charts and texts, as data for every renderer.

Knows neither a report's dictionary nor Markdown, HTML or a terminal. `sections.py` makes sections
of a report; `terminal.py`, `markdown.py` and `page.py` render them. The rule it protects: a figure
is chosen, named and ordered once, so that no renderer shows another report than the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Cell = str | bool | int | float | Mapping[str, Any] | None
"""A text, a verdict, a count, a value, a figure `{value, low, high, n, families}`, or nothing."""
Choice = Mapping[str, str]
"""Under which choices of the reader a block is shown: {"scorer": "judge"}; empty: always."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Example: Column(name="top1", title="2-way top-1", definition="share of ...", chance=0.5)
    """

    name: str
    """What the report calls it."""
    title: str
    definition: str = ""
    chance: float | None = None
    """What a verbalizer without knowledge reaches."""
    is_main: bool = True
    """The page shows the others when they are asked for."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a table: a cell for each column.

    Example: TableRow(name="sft", title="sft", cells=[{"value": 0.9, "low": 0.8, "high": 1.0}])
    """

    name: str
    """What it is about; rows of one table may share it."""
    title: str
    cells: Sequence[Cell]
    is_control: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column says what a row is."""

    title: str
    head: str
    """Of the first column."""
    columns: Sequence[Column]
    rows: Sequence[TableRow]
    look: Literal["plain", "figures", "gates", "counts"] = "plain"
    """How the page draws it; `figures` get intervals and sortable columns."""
    choice: Choice = field(default_factory=dict)
    is_folded: bool = False
    """Charts of the section show the same: the page unfolds the table on demand."""
    only: Literal["", "page", "text"] = ""
    """`page`: one table of many to choose from; `text`: the page shows the same in more detail."""
    on_terminal: Sequence[str] = ()
    """Names of the columns that the terminal shows; none: the terminal leaves the table out."""

    @property
    def heads(self) -> list[str]:
        return [self.head, *(column.title for column in self.columns)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: points {x, y, low, high}, of which all but x may be None."""

    name: str
    points: Sequence[Mapping[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines with bands over one axis."""

    label: str
    series: Sequence[Series]
    caption: str = ""
    x_label: str = ""
    x_domain: Sequence[float] | None = None
    """Least and most x; None: those of the points."""
    is_logarithmic: bool = False
    height: int = 240
    reference: Series | None = None
    """Drawn dashed: chance."""
    rules: Sequence[Mapping[str, Any]] = ()
    """Vertical lines {x, series, title}: steps at which something happened."""
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True, kw_only=True)
class IntervalMark:
    """A mark on a row of an IntervalChart: a figure in the tone of a series."""

    title: str
    series: str
    figure: Mapping[str, Any]
    is_hollow: bool = False
    """Its interval holds zero."""


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """Marks that stand under one label; `note` is written at the row's end."""

    label: str
    note: str
    marks: Sequence[IntervalMark]


@dataclass(frozen=True, kw_only=True)
class IntervalChart:
    """Rows of intervals on one axis."""

    label: str
    rows: Sequence[IntervalRow]
    caption: str = ""
    x_label: str = ""
    has_zero: bool = False
    """Whether the axis has a zero line."""
    kind: Literal["intervals"] = "intervals"


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    """Charts that are looked at together, with one legend."""

    charts: Sequence[LineChart | IntervalChart]
    legend: Sequence[str] = ()
    """Names of series."""
    choice: Choice = field(default_factory=dict)
    is_wide: bool = False


@dataclass(frozen=True)
class Warnings:
    """What a reader must know before any figure."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Bullets:
    """Lines of a list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Definitions:
    """(term, meaning) in the order of reading."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class DrawnExamples:
    """`{activation_id, domain, text, descriptions}`: texts of the corpus."""

    examples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Gallery:
    """All texts with all descriptions: the page alone has it."""

    num_rows: int


ReportBlock = Table | ChartGroup | Warnings | Bullets | Definitions | DrawnExamples | Gallery


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the report."""

    id: str
    """Of its element on the page."""
    name: str
    """In the list of sections."""
    title: str
    blocks: Sequence[ReportBlock]
    intro: str = ""
    how_to_read: str = ""
    """Of the charts: for the page alone."""


def shows_nothing(cell: Cell) -> bool:
    """Whether a cell has no value: None, a figure without a value, a number that is none."""
    value = cell.get("value") if isinstance(cell, Mapping) else cell
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def number(value: float | None) -> str:
    """Three digits after the point; of ten and more one; no negative zero. A dash for None.

    >>> number(0.98765), number(-23.456), number(-0.0004), number(None)
    ('0.988', '-23.5', '0.000', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:z.3f}"


def bounds(figure: Mapping[str, Any]) -> str:
    """The figure's 95% interval; the empty string where it has none.

    >>> bounds({"value": 0.943, "low": 0.925, "high": 0.96})
    '[0.925, 0.960]'
    """
    if figure.get("low") is None:
        return ""
    return f"[{number(figure['low'])}, {number(figure['high'])}]"


def interval(figure: Mapping[str, Any] | None) -> str:
    """The value with its interval; the value alone where there is none; a dash for no figure.

    >>> interval({"value": 0.943, "low": 0.925, "high": 0.96}), interval(None)
    ('0.943 [0.925, 0.960]', '–')
    """
    if figure is None or shows_nothing(figure):
        return "–"
    return f"{number(figure['value'])} {bounds(figure)}".rstrip()


def cell_text(cell: Cell) -> str:
    """A cell in words, for every renderer that has no markup for it.

    >>> [cell_text(cell) for cell in ("words", True, False, 12345, 0.25, None)]
    ['words', 'PASS', 'FAIL', '12,345', '0.250', '–']
    """
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "PASS" if cell else "FAIL"
    if isinstance(cell, Mapping):
        return interval(cell)
    return f"{cell:,}" if isinstance(cell, int) else number(cell)
