"""Rows and columns as the report's dictionary has them: verbalizers, scorers, figures.

Shared by `sections.py`, `curves.py` and `domains.py`; knows no section.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.rendering.content import Cell, Column, TableRow
from nla_ray.report.rendering.vocabulary import DEFINITIONS, spaced, title_of

Report = Mapping[str, Any]
"""The dictionary that report.json holds."""


def keys_of(mappings: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """The keys of all mappings, each once, in the order in which they come first.

    >>> keys_of([{"a": 1}, None, {"b": 1, "a": 1}])
    ['a', 'b']
    """
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or ()))


def judge_first(scorers: Iterable[str]) -> list[str]:
    """The independent scorer before the others: it is shown before anyone chooses."""
    return sorted(scorers, key=lambda scorer: scorer != "judge")


def verbalizer_rows(cells: Mapping[str, Sequence[Cell]]) -> list[TableRow]:
    """A row for each verbalizer."""
    return [
        TableRow(name=name, title=spaced(name), cells=row, is_control=name in CONTROLS)
        for name, row in cells.items()
    ]


def plain_columns(titles: Iterable[str]) -> list[Column]:
    """Columns that the report has no figures for."""
    return [Column(name=title, title=title) for title in titles]


def figure_columns(report: Report, figures: Sequence[str], main: Sequence[str]) -> list[Column]:
    """Columns of figures with definition and chance."""
    chance = report.get("chance", {})
    return [
        Column(
            name=figure,
            title=title_of(figure),
            definition=DEFINITIONS.get(figure, ""),
            chance=chance.get(figure),
            is_main=figure in main,
        )
        for figure in figures
    ]
