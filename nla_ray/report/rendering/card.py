"""The card of a preset: its report without any text, how to make it again, and what people found.

Pure: it takes a report, seconds, settings and findings as values. The rule it protects: a card goes
into the package, so no text of a corpus and no description of one may stand in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from nla_ray.report.rendering.content import DrawnExamples, Section, Table, TableRow
from nla_ray.report.rendering.markdown import (
    fenced,
    opening_markdown,
    section_markdown,
    text_sections,
)
from nla_ray.report.rendering.rows import plain_columns

Settings = Mapping[str, Mapping[str, Any]]
"""section -> field -> value."""
_LAST = ("lineage", "protocols", "definitions")
"""Sections that are looked up, not read: after what people found."""
_UNSAID = (("evaluation", "gates"),)
"""Too long for a command line; the gates have a section of their own."""


def to_card(
    report: Mapping[str, Any],
    *,
    seconds: Mapping[str, float],
    commands: Sequence[str],
    findings: str = "",
    examples: Sequence[Mapping[str, Any]] = (),
    picture: str = "",
) -> str:
    """The card as Markdown.

    `seconds`: of every stage. `findings`: Markdown with heads of level 2. `examples`: texts written
    for the card, as `report.example` explains them. `picture`: the file beside the card that shows
    `curves.word_chart`.
    """
    shown = [section for section in text_sections(report) if not _holds_texts(section)]
    parts = [
        f"# Card of preset `{report['preset']}`",
        "Written by the report job (`jobs/evaluate.py --card`) from the report of a complete run.",
        opening_markdown(report),
        examples_markdown(examples),
        f"![Share of claims in the text by number of claims]({picture})" if picture else "",
        "## How to make it again",
        "\n".join(["```bash", *commands, "```"]),
        section_markdown(seconds_section(seconds)) if seconds else "",
        *(section_markdown(section) for section in shown if section.id not in _LAST),
        findings.strip(),
        *(section_markdown(section) for section in shown if section.id in _LAST),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _holds_texts(section: Section) -> bool:
    return any(isinstance(block, DrawnExamples) for block in section.blocks)


def examples_markdown(examples: Sequence[Mapping[str, Any]]) -> str:
    """Texts with what the verbalizer says of their activations, and the judge's score of it."""
    parts = ["## Texts written for this card"] if examples else []
    for example in examples:
        score = (
            f"centred cosine {example['right']:.3f} with its own activation,"
            f" {example['wrong']:.3f} with the other text's (judge)"
        )
        rows = {"text": example["text"], "description": example["description"], "score": score}
        lines = [
            f"{name if number == 0 else '':<13}{line}"
            for name, content in rows.items()
            for number, line in enumerate(content.splitlines())
        ]
        parts.append(fenced("\n".join(lines)))
    return "\n\n".join(parts)


def seconds_section(seconds: Mapping[str, float]) -> Section:
    """How long every stage took, and all together."""
    together = round(sum(seconds.values()), 1)
    rows = [
        TableRow(name=name, title=name, cells=[f"{value:,.1f}"])
        for name, value in {**seconds, "all stages": together}.items()
    ]
    table = Table(title="Seconds", head="stage", columns=plain_columns(["seconds"]), rows=rows)
    return Section(id="seconds", name="Seconds", title="Seconds", blocks=[table])


def commands_of(
    preset: str, recorded: Settings, defaults: Settings, seeds: Sequence[int] = ()
) -> list[str]:
    """The commands that make the run and its card again, with every setting that differs.

    `recorded`: what the run's manifests say; `defaults`: what the preset says; `seeds`: those that
    the report compares.

    >>> commands_of("nano", {"sft": {"epochs": 2, "seed": 0}}, {"sft": {"epochs": 1, "seed": 0}})
    ['python jobs/pipeline.py --sft.epochs 2', 'python jobs/evaluate.py --sft.epochs 2 --card']
    """
    flags = [] if preset == "nano" else ["--preset", preset]
    for section, fields in recorded.items():
        for field, value in fields.items():
            if field not in defaults.get(section, {}) or (section, field) in _UNSAID:
                continue
            if value != defaults[section][field]:
                flags += _flag(section, field, value)
    if seeds:
        flags += ["--seeds", *map(str, seeds)]
    line = shlex.join(flags)
    return [
        f"python jobs/pipeline.py {line}".rstrip(),
        " ".join(f"python jobs/evaluate.py {line} --card".split()),
    ]


def _flag(section: str, field: str, value: Any) -> list[str]:
    name = field.replace("_", "-")
    dotted = section.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dotted}.{name}" if value else f"--{dotted}.no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{dotted}.{name}", *(_without_folder(str(value)) for value in values)]


def _without_folder(value: str) -> str:
    """Of a path on somebody's machine the name of the file says enough."""
    path = PurePath(value)
    return path.name if path.is_absolute() else value
