"""The notes of a report: what it lacks, and what a reader of the descriptions wrote down.

Knows words, not figures. Protects the rule that a gap in the data is said before any figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from nla_ray.activation.bank import ActivationTable
from nla_ray.report.compared import Compared, read_descriptions
from nla_ray.report.evaluated import Evaluated
from nla_ray.report.pairing import protocol_notes
from nla_ray.run.artifact import Run

NOTES_NAME = "notes.txt"
"""A file in the run's folder, written by hand: a note a line. Every report of the run shows it."""


def readers_notes(run: Run) -> list[str]:
    """The lines of NOTES_NAME, without empty ones; none without the file."""
    file = run.root / NOTES_NAME
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.strip() for line in lines if line.strip()]


def missing_notes(
    evaluated: Evaluated, test: ActivationTable, compared: Sequence[Compared]
) -> list[str]:
    """What the report lacks: labels, and facts on the verbalizers named on the command line."""
    notes = []
    if unlabelled := sum(not label for label in evaluated.texts_of("gold")):
        notes.append(
            f"gold: {unlabelled} of {len(test.ids)} activations have no label; they count as"
            " described by nothing, in what is shuffled too."
        )
    if evaluated.patched is not None and (left_out := evaluated.patched.left_out):
        notes.append(
            f"patch-back: {left_out} of {left_out + len(evaluated.patched.rows)} activations are"
            " left out, because the base reads their texts otherwise than at capture."
        )
    for verbalizer in compared:
        name, path = verbalizer.name, verbalizer.path
        if verbalizer.manifest is None:
            notes.append(
                f"{name}: nothing is known of what it was trained on; test documents may be among"
                " it."
            )
        if verbalizer.is_file and (missing := read_descriptions(path, test.ids)[1]):
            notes.append(
                f"{name}: {missing} of {len(test.ids)} activations have no description in"
                f" {path.name}; they count as described by nothing."
            )
    return [*notes, *protocol_notes(evaluated.protocols, evaluated.from_elsewhere)]
