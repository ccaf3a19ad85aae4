"""The section by layer: every layer that the verbalizers describe, a row each."""

from __future__ import annotations

from nla_ray.report.rendering.content import Cell, Column, ReportBlock, Section, Table, TableRow
from nla_ray.report.rendering.rows import Report, keys_of
from nla_ray.report.rendering.vocabulary import spaced, title_of

_ON_TERMINAL = ("precision", "hallucinated", "linear.centred_cosine", "linear.top1_10way")


def layers_section(report: Report) -> Section:
    """A table with a row for each verbalizer and layer, the layers of one below one another."""
    layers = report.get("layers", {})
    by_name = [named for by_verbalizer in layers.values() for named in by_verbalizer.values()]
    figures = keys_of(by_name)
    rows = []
    for name in keys_of(layers.values()):
        for layer, by_verbalizer in layers.items():
            cells: list[Cell] = [by_verbalizer[name].get(figure) for figure in figures]
            title = f"{spaced(name)}, layer {layer}"
            rows.append(TableRow(name=name, title=title, cells=cells))
    table = Table(
        title="By layer",
        head="verbalizer",
        columns=[Column(name=figure, title=title_of(figure)) for figure in figures],
        rows=rows,
        on_terminal=_ON_TERMINAL,
    )
    blocks: list[ReportBlock] = [table] if rows else []
    return Section(
        id="layers",
        name="Layers",
        title=table.title,
        intro=(
            "One verbalizer, told the layer in its prompt, describes the same tokens at several."
            " Other scorers read the first of these alone: a linear one is fitted to each. What it"
            " reads in the gold labels says how far a layer follows from its text."
        ),
        blocks=blocks,
    )
