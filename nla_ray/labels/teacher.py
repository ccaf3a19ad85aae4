"""What a teacher is, and which teachers a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nla_ray.config import require
from nla_ray.labels.offline import ContentFirstTeacher, FormatFirstTeacher, WordStatistics


class Teacher(Protocol):
    """Describes texts; knows nothing of activations, of splits or of the other teachers.

    `describe` returns the raw description, as long and as marked up as it comes; the cleaner is
    elsewhere. It must not depend on the texts described before.
    """

    name: str

    def describe(self, text: str, domain: str) -> str: ...


def make_teachers(names: Sequence[str], statistics: WordStatistics) -> list[Teacher]:
    """One teacher for each name, in that order. Raises ValueError for an unknown, a repeated or no
    name."""
    known = {teacher.name: teacher for teacher in (ContentFirstTeacher, FormatFirstTeacher)}
    require(
        len(names) > 0 and len(set(names)) == len(names),
        "label.teachers",
        tuple(names),
        "different names, at least one",
        "Set --label.teachers.",
    )
    for name in names:
        require(
            name in known,
            "label.teachers",
            name,
            f"one of {', '.join(known)}",
            "Labels of other teachers are imported: --label.import-path.",
        )
    return [known[name](statistics) for name in names]
