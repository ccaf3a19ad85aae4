"""The section on the refreshed scorer: two verbalizers by two scorers."""

from __future__ import annotations

from nla_ray.report.rendering.content import Cell, ReportBlock, Section, Table, TableRow
from nla_ray.report.rendering.rows import Report, keys_of, plain_columns
from nla_ray.report.rendering.vocabulary import spaced, title_of

_COLUMNS = {
    "reward": "trained on labels",
    "refreshed": "and on SFT's descriptions",
    "difference": "second less first",
}


def refreshed_section(report: Report) -> Section:
    """A table for each metric: a row for each verbalizer and pair, a column for each scorer."""
    by_name = report.get("refreshed", {})
    metrics = keys_of(by_scorer["reward"] for by_scorer in by_name.values())
    blocks: list[ReportBlock] = []
    for metric in metrics:
        rows = []
        for name, by_scorer in by_name.items():
            cells: list[Cell] = [by_scorer[scorer][metric] for scorer in _COLUMNS]
            title = " − ".join(spaced(part) for part in name.split("-"))
            rows.append(TableRow(name=name, title=title, cells=cells))
        blocks.append(
            Table(
                title=title_of(metric),
                head="verbalizer",
                columns=plain_columns(_COLUMNS.values()),
                rows=rows,
            )
        )
    return Section(
        id="refreshed",
        name="Refreshed scorer",
        title="Two verbalizers by two scorers",
        intro=(
            "The reward scorer was trained on labels. The refreshed one went on from it with what"
            " the SFT verbalizer writes of train documents, so that a verbalizer's style is no news"
            " to it. A gain that only the first sees is one of style; the last column of a"
            " difference says by how much the two scorers disagree about it."
        ),
        blocks=blocks,
    )
