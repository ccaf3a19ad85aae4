"""Rows, columns and tables as the report's dictionary has them: verbalizers, scorers, figures.

Shared by `sections.py`, `curves.py` and `domains.py`; knows no section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.rendering.content import Cell, Column, Table, TableRow
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


def scorer_tables(
    report: Report,
    figures: Sequence[str],
    *,
    title: str,
    main: Sequence[str],
    on_terminal: Callable[[str], Sequence[str]],
) -> list[Table]:
    """A table for each scorer, the judge's first: a row for each verbalizer.

    `title` has a place for the scorer's name. `main`: figures that are shown before anyone asks for
    all; `on_terminal` gives those of a scorer that a terminal shows.
    """
    results = report["results"]
    tables = []
    for scorer in judge_first(keys_of(results.values())):
        cells: dict[str, list[Cell]] = {
            name: [by_scorer.get(scorer, {}).get(figure) for figure in figures]
            for name, by_scorer in results.items()
        }
        tables.append(
            Table(
                title=title.format(scorer),
                head="verbalizer",
                columns=figure_columns(report, figures, main),
                rows=verbalizer_rows(cells),
                look="figures",
                choice={"scorer": scorer},
                on_terminal=on_terminal(scorer),
            )
        )
    return tables


def scored_figures(report: Report) -> list[str]:
    """Every figure that some scorer has of some verbalizer, in the order of the report."""
    return keys_of(
        figures for by_scorer in report["results"].values() for figures in by_scorer.values()
    )
