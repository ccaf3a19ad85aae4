"""The section on differences between descriptions of the same length."""

from __future__ import annotations

from nla_ray.report.rendering.content import Cell, ReportBlock, Section, Table, TableRow
from nla_ray.report.rendering.rows import (
    Report,
    figure_columns,
    judge_first,
    keys_of,
    plain_columns,
)
from nla_ray.report.rendering.vocabulary import spaced

_VIEWS = {"whole": "as they are", "cut": "both cut to the shorter", "matched": "lengths that match"}


def lengths_section(report: Report) -> Section:
    """A table for each scorer: every pair at its own lengths, cut alike, and where they match."""
    by_pair = report.get("lengths", {})
    views = [view for by_view in by_pair.values() for view in by_view.values()]
    scorers = judge_first(name for name in keys_of(views) if name != "tokens")
    blocks: list[ReportBlock] = [_table(report, scorer) for scorer in scorers]
    return Section(
        id="lengths",
        name="Lengths",
        title="Differences at equal length",
        intro=(
            "A longer description may win by its length. Paired differences of whole descriptions;"
            " with both descriptions of an activation cut to the tokens of the shorter one; and"
            " over the activations whose two descriptions differ by a tenth in length at most."
        ),
        blocks=blocks if by_pair else [],
    )


def _table(report: Report, scorer: str) -> Table:
    by_pair = report["lengths"]
    figures = keys_of(view[scorer] for by_view in by_pair.values() for view in by_view.values())
    rows = []
    for pair, by_view in by_pair.items():
        first, second = pair.split("-")
        for name, view in by_view.items():
            cells: list[Cell] = [_VIEWS[name], *view["tokens"], view["tokens"][0]["n"]]
            cells += [view[scorer].get(figure) for figure in figures]
            title = f"{spaced(first)} − {spaced(second)}"
            rows.append(TableRow(name=pair, title=title, cells=cells))
    columns = plain_columns(["descriptions", "tokens, first", "tokens, second", "n"])
    return Table(
        title="Of claims" if scorer == "claims" else f"Under the {scorer} scorer",
        head="difference",
        columns=[*columns, *figure_columns({}, figures, figures)],
        rows=rows,
        choice={"scorer": scorer},
        only="" if scorer in ("judge", "claims") else "page",
    )
