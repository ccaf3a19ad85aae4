"""What an offline teacher is, and the table of those that a configuration may name.

Protects the rule that a teacher sees a text and the words of train texts, and nothing else.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Protocol

from nla_ray.settings.config import require
from nla_ray.settings.teachers import TEACHER_FORMS, is_asked
from nla_ray.text.words import WordStatistics

TEACHERS = {
    "offline-content-first": "nla_ray.nano.offline_teachers:ContentFirstTeacher",
    "offline-format-first": "nla_ray.nano.offline_teachers:FormatFirstTeacher",
}
"""Name -> class of every teacher that `label.teachers` may name; a class is loaded when named.

To add a teacher:
1. Write a class with `name` and `describe` (see Teacher). It is called with the WordStatistics of
   the train texts: how many there are, and in how many of them each word occurs.
2. Add its line here. Nothing else: cleaning, the draw and the files are the same for all teachers.
"""


class Teacher(Protocol):
    """Describes texts; knows nothing of activations, of splits or of the other teachers."""

    name: str

    def describe(self, text: str, domain: str) -> str:
        """The raw description of one text, as long and as marked up as it comes.

        It gets the text (of a position inside it: the text up to there) and the slug of its domain,
        and must not depend on earlier calls. The cleaner is elsewhere.
        """
        ...


def make_teachers(names: Sequence[str], statistics: WordStatistics) -> list[Teacher]:
    """One offline teacher for each name, in that order; those on the network are left out.

    Raises ValueError for an unknown name, a repeated name or no name.
    """
    require(
        len(names) > 0 and len(set(names)) == len(names),
        "label.teachers",
        tuple(names),
        "different names, at least one",
        "Set --label.teachers.",
    )
    offline = [name for name in names if not is_asked(name)]
    for name in offline:
        require(
            name in TEACHERS,
            "label.teachers",
            name,
            f"one of {', '.join(TEACHERS)}, or {TEACHER_FORMS}",
            "Labels of other teachers are imported: --label.import-path.",
        )
    return [pkgutil.resolve_name(TEACHERS[name])(statistics) for name in offline]
