"""The section on how the descriptions were generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_ray.report.rendering.content import Section, Table, TableRow
from nla_ray.report.rendering.rows import Report, plain_columns
from nla_ray.report.rendering.vocabulary import spaced

_PARTS = ("decoding", "limits", "engine", "prompt", "weights")


def protocols_section(report: Report) -> Section:
    """The generation protocol of every verbalizer."""
    rows = []
    for name, protocol in report.get("protocols", {}).items():
        if isinstance(protocol, str):  # not generated, or not recorded
            cells = [protocol, *["–"] * (1 + len(_PARTS))]
        else:
            parts = [_listed(protocol[part]) for part in _PARTS]
            cells = [protocol["hash"], protocol["comparison"], *parts]
        rows.append(TableRow(name=name, title=spaced(name), cells=cells))
    table = Table(
        title="Generation protocols",
        head="verbalizer",
        columns=plain_columns(["protocol", "of a comparison", *_PARTS]),
        rows=rows,
    )
    return Section(
        id="protocols",
        name="Protocols",
        title=table.title,
        intro=(
            "How the descriptions were generated. Two verbalizers are compared where all but the"
            " weights is the same: then the hashes of a comparison are equal."
        ),
        blocks=[table] if rows else [],
    )


def _listed(section: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{spaced(name)} {value}" for name, value in section.items() if value is not None
    )
