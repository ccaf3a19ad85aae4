"""The section on differences of two activations: what is said of them, under every scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.rendering.content import (
    Cell,
    Column,
    DrawnExamples,
    ReportBlock,
    Section,
    Table,
    TableRow,
)
from nla_ray.report.rendering.rows import Report, judge_first, keys_of
from nla_ray.report.rendering.vocabulary import spaced

_FIGURES = {
    "right_pair": (
        "right pair of ten",
        "share of readings nearer to n(a) - n(b) than to nine n(x) - n(y), x of another family",
    ),
    "right_second": (
        "right second of ten",
        "the same among nine n(a) - n(y): a description of a alone is at chance",
    ),
    "pair_cosine": ("cosine", "mean cosine of the reading, less the train mean, with n(a) - n(b)"),
}


def differences_section(report: Report) -> Section:
    """For each scorer a table of values and one of paired differences; then examples."""
    found = report.get("differences", {})
    blocks: list[ReportBlock] = []
    if found:
        blocks += _tables(found["results"], found["chance"], "Under the {} scorer", "verbalizer")
        blocks += _tables(found["paired"], {}, "Paired, under the {} scorer", "difference")
        blocks.append(DrawnExamples(found["examples"]))
    return Section(
        id="differences",
        name="Of two",
        title="Differences of two activations",
        intro=(
            f"{found.get('pairs', 0):,} pairs of activations a and b of two families. What is"
            " described is n(a) - n(b); of first: the description of a alone; gold: what a's label"
            " says and b's does not; shuffled: that of another pair."
        ),
        blocks=blocks,
    )


def _tables(
    by_name: Mapping[str, Any], chance: Mapping[str, float], title: str, head: str
) -> list[Table]:
    """A table for each scorer, the judge's first: a row for each name."""
    scorers = judge_first(keys_of(by_name.values()))
    return [_table(by_name, scorer, chance, title.format(scorer), head) for scorer in scorers]


def _table(
    by_name: Mapping[str, Any], scorer: str, chance: Mapping[str, float], title: str, head: str
) -> Table:
    is_values = bool(chance)
    columns = [
        Column(name=figure, title=name, definition=definition, chance=chance.get(figure))
        for figure, (name, definition) in _FIGURES.items()
    ]
    rows = []
    for name, by_scorer in by_name.items():
        cells: list[Cell] = [by_scorer[scorer][figure] for figure in _FIGURES]
        shown = " − ".join(spaced(part) for part in name.split("-"))
        rows.append(TableRow(name=name, title=shown, cells=cells, is_control=name in CONTROLS))
    on_terminal: Sequence[str] = tuple(_FIGURES) if is_values and scorer == "judge" else ()
    return Table(
        title=title,
        head=head,
        columns=columns,
        rows=rows,
        look="figures",
        choice={"scorer": scorer},
        on_terminal=on_terminal,
    )
