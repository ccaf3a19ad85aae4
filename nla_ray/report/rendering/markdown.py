"""The report as Markdown: report.md, and what the card of a preset is made of.

Knows blocks, not figures. The rules it protects: no text of a corpus can end the fence it stands
in, and no line or cell becomes markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.report.rendering.content import (
    Bullets,
    ChartGroup,
    Definitions,
    DrawnExamples,
    Gallery,
    ReportBlock,
    Section,
    Table,
    Warnings,
    cell_text,
)
from nla_ray.report.rendering.sections import gates_passed, opening, sections

_INLINE = re.compile(
    r"""
    [*`~]                 # emphasis, code, a struck text
    | (?<!\w)_ | _(?!\w)  # emphasis, but not inside a word
    | <(?=[A-Za-z/!?])    # a tag, a comment, an address
    | &(?=\#|\w+;)        # an entity
    | \](?=[(\[:])        # a link
    | \\(?=[^\w\s])       # an escape
    """,
    re.VERBOSE,
)
"""Signs that Markdown, or HTML inside it, would read as markup in any line."""
_BLOCK = re.compile(r"^(?:#(?=[#\s])|[-+](?=\s)|>)|(?:(?<=^\d)|(?<=^\d\d))[.)](?=\s)")
"""Signs of a head, a list or a quotation at the start of a line."""
_WITH_BACKSLASH = r"\\\g<0>"


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# Report of `{report['preset']}`", opening_markdown(report)]
    parts += [section_markdown(section) for section in text_sections(report)]
    return "\n\n".join(parts) + "\n"


def text_sections(report: Mapping[str, Any]) -> list[Section]:
    """The sections that have something to read without a page: charts alone are left out."""
    return [section for section in sections(report) if any(map(_is_text, section.blocks))]


def opening_markdown(report: Mapping[str, Any]) -> str:
    """What the report is about, and how many gates passed."""
    passed, gates = gates_passed(report)
    lines = opening(report)
    if gates:
        lines.append(f"{passed} of {gates} gates passed")
    return _bullets(lines)


def section_markdown(section: Section) -> str:
    """A section with its tables; a table of another title than the section's under a head."""
    parts = [f"## {section.title}"]
    if section.intro:
        parts.append(section.intro)
    tables = [block for block in section.blocks if isinstance(block, Table) and _is_text(block)]
    for block in section.blocks:
        if not _is_text(block):
            continue
        if isinstance(block, Table) and (len(tables) > 1 or block.title != section.title):
            parts.append(f"### {block.title}")
        if content := _block_markdown(block):
            parts.append(content)
    return "\n\n".join(parts)


def table_markdown(table: Table) -> str:
    """A table of Markdown."""
    lines = [table.heads, ["---"] * len(table.heads)]
    lines += [[row.title, *map(cell_text, row.cells)] for row in table.rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _is_text(block: ReportBlock) -> bool:
    """Whether a block can be read without the page."""
    if isinstance(block, Table):
        return block.only != "page"
    return not isinstance(block, ChartGroup | Gallery)


def _block_markdown(block: ReportBlock) -> str:
    if isinstance(block, Table):
        return table_markdown(block)
    if isinstance(block, Warnings):
        return _bullets([f"WARNING: {line}" for line in block.lines])
    if isinstance(block, Bullets):
        return _bullets(block.lines)
    if isinstance(block, Definitions):
        return _bullets([f"{term}: {meaning}" for term, meaning in block.entries])
    if isinstance(block, DrawnExamples):
        return "\n\n".join(
            _example(number, example) for number, example in enumerate(block.examples, 1)
        )
    return ""


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_BLOCK.sub(_WITH_BACKSLASH, _escaped(line))}" for line in lines)


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")


def _escaped(text: str) -> str:
    """One line that reads as the text does.

    >>> print(_escaped("<b> is *so* `a_b` < 1"))
    \\<b> is \\*so\\* \\`a_b\\` < 1
    """
    return _INLINE.sub(_WITH_BACKSLASH, " ".join(text.splitlines()))


def _example(number: int, example: Mapping[str, Any]) -> str:
    parts = [f"### Example {number}: {example['domain']}", f"`{example['activation_id']}`"]
    parts.append(fenced(example["text"]))
    for name, description in example["descriptions"].items():
        parts += [f"{name}:", fenced(description)]
    return "\n\n".join(parts)


def fenced(text: str) -> str:
    """A text between fences that are longer than any run of backticks in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
