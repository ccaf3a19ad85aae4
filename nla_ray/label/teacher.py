"""What a teacher is, and which teachers a configuration names."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Protocol

from nla_ray.settings.config import require
from nla_ray.text.words import WordStatistics

TEACHERS = {
    "offline-content-first": "nla_ray.nano.offline_teachers:ContentFirstTeacher",
    "offline-format-first": "nla_ray.nano.offline_teachers:FormatFirstTeacher",
}
"""Every teacher that `label.teachers` may name, and its class, loaded when it is named.

To add one: write a class with `name` and `describe`, made from WordStatistics, and name it here.
"""


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
    require(
        len(names) > 0 and len(set(names)) == len(names),
        "label.teachers",
        tuple(names),
        "different names, at least one",
        "Set --label.teachers.",
    )
    for name in names:
        require(
            name in TEACHERS,
            "label.teachers",
            name,
            f"one of {', '.join(TEACHERS)}",
            "Labels of other teachers are imported: --label.import-path.",
        )
    return [pkgutil.resolve_name(TEACHERS[name])(statistics) for name in names]
