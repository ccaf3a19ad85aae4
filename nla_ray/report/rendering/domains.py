"""The sections by domain of the texts: every figure in each, and which domain descriptions name.

Computes no figure. Controls are left out; report.json has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.rendering.content import (
    Cell,
    ChartGroup,
    Column,
    IntervalChart,
    IntervalMark,
    IntervalRow,
    ReportBlock,
    Section,
    Table,
    TableRow,
    shows_nothing,
)
from nla_ray.report.rendering.rows import Report, keys_of
from nla_ray.report.rendering.vocabulary import spaced, title_of

_DOMAIN_FIGURES = {
    "precision": "words in text",
    "domain": "domain right",
    "judge.centred_cosine": "judge's centred cosine",
}
_COUNT_COLUMN = Column(name="n", title="activations")


def domains_section(report: Report) -> Section:
    """Every figure by domain, without the controls, which are in report.json."""
    domains = report.get("domains", {})
    by_name = [figures for named in domains.values() for figures in named.values()]
    blocks: list[ReportBlock] = []
    for figure in keys_of(by_name):
        blocks += [_domain_chart(domains, figure), _domain_table(domains, figure)]
    if domains:
        blocks.append(domains_table(report))
    return Section(
        id="domains",
        name="Domains",
        title="By domain",
        intro="Each over the documents of the domain.",
        blocks=blocks,
    )


def domains_table(report: Report) -> Table:
    """The figures of _DOMAIN_FIGURES by domain, side by side."""
    domains = report["domains"]
    names = _speakers(domains)
    columns = [_COUNT_COLUMN]
    for name in names:
        for figure, title in _DOMAIN_FIGURES.items():
            columns.append(Column(name=f"{name}.{figure}", title=f"{spaced(name)}: {title}"))
    rows = []
    for domain, named in domains.items():
        cells: list[Cell] = [_count(named)]
        for name in names:
            cells += [named[name].get(figure) for figure in _DOMAIN_FIGURES]
        rows.append(TableRow(name=domain, title=spaced(domain), cells=cells))
    return Table(title="By domain", head="domain", columns=columns, rows=rows, only="text")


def _speakers(domains: Mapping[str, Any]) -> list[str]:
    return [name for name in keys_of(domains.values()) if name not in CONTROLS]


def _count(named: Mapping[str, Any]) -> int | None:
    """Activations of a domain: the most that a figure of it is over."""
    counts = [figure["n"] for figures in named.values() for figure in figures.values()]
    return max(counts, default=None)


def _domain_table(domains: Mapping[str, Any], figure: str) -> Table:
    names = _speakers(domains)
    rows = []
    for domain, named in domains.items():
        cells = [_count(named), *(named.get(name, {}).get(figure) for name in names)]
        rows.append(TableRow(name=domain, title=spaced(domain), cells=cells))
    columns = [_COUNT_COLUMN, *(Column(name=name, title=spaced(name)) for name in names)]
    return Table(
        title=title_of(figure),
        head="domain",
        columns=columns,
        rows=rows,
        choice={"figure": figure},
        is_folded=True,
        only="page",
    )


def _domain_chart(domains: Mapping[str, Any], figure: str) -> ChartGroup:
    names = _speakers(domains)
    rows = []
    for domain, named in domains.items():
        marks = []
        for name in names:
            value = named.get(name, {}).get(figure)
            if not shows_nothing(value):
                title = f"{spaced(domain)}, {spaced(name)}"
                marks.append(IntervalMark(title=title, series=name, figure=value))
        note = f"{marks[0].figure['n']:,} activations" if marks else ""
        rows.append(IntervalRow(label=spaced(domain), note=note, marks=marks))
    title = title_of(figure)
    chart = IntervalChart(label=f"{title} by domain", x_label=title, rows=rows)
    return ChartGroup(charts=[chart], legend=names, choice={"figure": figure})


def confusion_section(report: Report) -> Section:
    """Which domain descriptions name, by the true one; the verbalizer trained last comes first."""
    tables: list[ReportBlock] = []
    for name, counts in reversed(list(report.get("confusion", {}).items())):
        named = list(dict.fromkeys([*counts, *keys_of(counts.values())]))
        rows = []
        for domain, by_name in counts.items():
            cells = [by_name.get(column, 0) for column in named]
            rows.append(TableRow(name=domain, title=spaced(domain), cells=cells))
        tables.append(
            Table(
                title=f"Named by {spaced(name)}",
                head="true ↓  named →",
                columns=[Column(name=domain, title=spaced(domain)) for domain in named],
                rows=rows,
                look="counts",
                choice={"verbalizer": name},
                only="page",
            )
        )
    return Section(
        id="confusion",
        name="Confusion",
        title="Domain named, domain true",
        intro=(
            "Rows are true domains, columns the domain that a description names first; shading is"
            " the share of the row."
        ),
        blocks=tables,
    )
