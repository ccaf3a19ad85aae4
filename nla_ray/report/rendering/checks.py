"""Sections on what a description is worth apart from its scores: probe, patch-back, wording.

Reports of earlier versions have none of them; each section then says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_ray.report.controls import CONTROLS
from nla_ray.report.recovered import PATCH_FIGURES
from nla_ray.report.rendering.content import Bullets, Cell, Column, Section, Table, TableRow
from nla_ray.report.rendering.rows import (
    Report,
    judge_first,
    keys_of,
    plain_columns,
    scored_figures,
    scorer_tables,
    verbalizer_rows,
)
from nla_ray.report.rendering.vocabulary import spaced, title_of

_PROBE_TITLES = {
    "words": "words claimed",
    "precision": "in the text",
    "probe_precision": "of the probe's in the text",
    "difference": "difference",
    "true_words": "true words",
    "probe_true_words": "the probe's true words",
}
NOT_MEASURED = Bullets(["Not measured."])


def probe_section_of(report: Report) -> Section:
    """Each verbalizer beside the linear probe, at the same number of words."""
    probe: Mapping[str, Any] = report.get("probe", {})
    figures = keys_of(probe.values())
    cells = {name: [named[figure] for figure in figures] for name, named in probe.items()}
    table = Table(
        title="Beside a linear probe",
        head="verbalizer",
        columns=[Column(name=figure, title=_PROBE_TITLES[figure]) for figure in figures],
        rows=verbalizer_rows(cells),
        look="figures",
        on_terminal=figures,
    )
    return Section(
        id="probe",
        name="Probe",
        title=table.title,
        intro=(
            "A ridge regression from activations to the words of their texts says as many words as"
            " the description claims. A verbalizer that names fewer true words than this probe has"
            " not read what is there."
        ),
        blocks=[table if probe else NOT_MEASURED],
    )


def patch_back_section(report: Report) -> Section:
    """How much of what the base says next comes back, by verbalizer and scorer."""
    measured = scored_figures(report)
    figures = [figure for figure in PATCH_FIGURES if figure in measured]
    tables = scorer_tables(
        report,
        figures,
        title="As the {} scorer reconstructs",
        main=figures,
        on_terminal=lambda scorer: figures if scorer == "judge" else (),
    )
    return Section(
        id="patch-back",
        name="Patch-back",
        title="Put back into the base",
        intro=(
            "The reconstruction, at the activation's length, stands in its place in the base, and"
            " the base says the next token. No cosine takes part."
        ),
        blocks=tables if figures else [NOT_MEASURED],
    )


def wording_section_of(report: Report) -> Section:
    """What scores lose when the same claims stand in another order or in other words."""
    wording: Mapping[str, Any] = report.get("wording", {})
    forms = [form for by_form in wording.values() for form in by_form.values()]
    scorers = judge_first(name for name in keys_of(forms) if name != "changed")
    columns = plain_columns(["rewording", "descriptions changed"])
    named = [(scorer, figure) for scorer in scorers for figure in keys_of(f[scorer] for f in forms)]
    columns += plain_columns(title_of(f"{scorer}.{figure}") for scorer, figure in named)
    rows = []
    for name, by_form in wording.items():
        for form, lost in by_form.items():
            cells: list[Cell] = [spaced(form), lost["changed"]]
            cells += [lost[scorer][figure] for scorer, figure in named]
            rows.append(
                TableRow(name=name, title=spaced(name), cells=cells, is_control=name in CONTROLS)
            )
    table = Table(
        title="Lost in other words or another order", head="verbalizer", columns=columns, rows=rows
    )
    return Section(
        id="wording",
        name="Wording",
        title=table.title,
        intro=(
            "The figure of the descriptions as they are, less that of the same claims with their"
            " bullets reversed, with bullets, sentences and listed words shuffled, and with"
            " synonyms by a fixed table."
        ),
        blocks=[table if rows else NOT_MEASURED],
    )
