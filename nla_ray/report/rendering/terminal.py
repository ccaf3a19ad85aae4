"""The report on a terminal: the main tables, warnings, and the examples.

Short on purpose: a table that names no column for the terminal is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nla_ray.report.rendering.content import DrawnExamples, Table, Warnings, cell_text
from nla_ray.report.rendering.sections import sections

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

_PLAIN_WIDTH = 150
"""Columns where output goes to a file or a log."""


def print_report(report: Mapping[str, Any]) -> None:
    """The report's main tables, warnings and examples on the terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    blocks = [block for section in sections(report) for block in section.blocks]
    for block in blocks:
        if isinstance(block, Table) and block.on_terminal:
            console.print(_rich_table(block))
    for block in blocks:
        if isinstance(block, Warnings):
            for line in block.lines:
                console.print(f"WARNING: {line}", style="bold red", markup=False)
    console.print(
        f"{report['n']} activations of {report['documents']} {report['split']} documents in"
        f" {report.get('families', report['documents'])} families; 95% intervals over families"
    )
    for block in blocks:
        if isinstance(block, DrawnExamples):
            _print_examples(console, block)


def _rich_table(table: Table) -> RichTable:
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    rich = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    shown = [
        number for number, column in enumerate(table.columns) if column.name in table.on_terminal
    ]
    rich.add_column(table.head, no_wrap=True)
    for number in shown:
        rich.add_column(table.columns[number].title)
    for row in table.rows:
        cells = [cell_text(row.cells[number]) for number in shown]
        rich.add_row(escape(row.title), *map(escape, cells))
    return rich


def _print_examples(console: Console, block: DrawnExamples) -> None:
    from rich.markup import escape

    for example in block.examples:
        console.rule(escape(f"{example['domain']}  {example['activation_id']}"))
        console.print(example["text"], markup=False, highlight=False)
        for name, description in example["descriptions"].items():
            style = "bold" if name.startswith("grpo") else None
            console.print(f"\n{name}:\n{description}", markup=False, highlight=False, style=style)
