"""The section on seeds: every training's figures, and how far they spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_ray.report.rendering.content import Cell, ReportBlock, Section, Table, TableRow
from nla_ray.report.rendering.rows import Report, plain_columns
from nla_ray.report.rendering.vocabulary import MAIN_METRICS, spaced, title_of


def seeds_section(report: Report) -> Section:
    """A table for each training: a row for each figure, a column for each seed."""
    blocks: list[ReportBlock] = []
    for stage, trained in report.get("seeds", {}).items():
        blocks.append(_table(spaced(stage), trained["seeds"], trained["figures"]))
        if "minus_sft" in trained:
            title = f"{spaced(stage)} − sft, paired"
            blocks.append(_table(title, trained["seeds"], trained["minus_sft"]))
    return Section(
        id="seeds",
        name="Seeds",
        title="Spread over seeds",
        intro=(
            "Trainings that differ by their seed alone. An interval holds one training fixed and"
            " says what other documents would change; the spread, the standard deviation over the"
            " seeds, says what another training would."
        ),
        blocks=blocks,
    )


def _table(title: str, seeds: Mapping[str, int], figures: Mapping[str, Any]) -> Table:
    rows = []
    for scorer, by_figure in figures.items():
        for name in _ordered(by_figure):
            found = by_figure[name]
            cells: list[Cell] = [found["by_seed"][verbalizer] for verbalizer in seeds]
            cells += [found["mean"], found["spread"]]
            rows.append(TableRow(name=name, title=f"{scorer}: {title_of(name)}", cells=cells))
    columns = [f"{spaced(name)} (seed {seed})" for name, seed in seeds.items()]
    return Table(
        title=title, head="figure", columns=plain_columns([*columns, "mean", "spread"]), rows=rows
    )


def _ordered(by_figure: Mapping[str, Any]) -> list[str]:
    main = [name for name in MAIN_METRICS if name in by_figure]
    return list(dict.fromkeys([*main, *by_figure]))
