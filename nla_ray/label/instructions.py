"""The prompts that teachers are asked with: files of this package, or a file of the user's.

A prompt is the whole message, with `{text}` where the text stands. It is known by the hash of its
file, which every stored answer names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nla_ray.settings.config import require

PROMPT_FOLDER = Path(__file__).parent / "prompts"
"""The prompts of this project, NAME.txt."""
TEACHER_PROMPTS = ("activation", "content")
"""Those that `label.prompt` may name."""
CLEANER_PROMPT = str(PROMPT_FOLDER / "cleaner.txt")
_TEXT = "{text}"


@dataclass(frozen=True, kw_only=True)
class TeacherPrompt:
    """A prompt and the hash it is known by.

    Example: TeacherPrompt(template="Describe: {text}", sha256="5f1c...")
    """

    template: str
    sha256: str

    @classmethod
    def load(cls, name: str) -> TeacherPrompt:
        """The prompt that `label.prompt` names: one of this project, or a file.

        Raises ValueError for a file that is missing, is no UTF-8, or says `{text}` not once.
        """
        is_own = name in TEACHER_PROMPTS
        path = PROMPT_FOLDER / f"{name}.txt" if is_own else Path(name).expanduser()
        require(
            path.is_file(),
            "label.prompt",
            name,
            f"{' or '.join(TEACHER_PROMPTS)}, or a file",
            "Correct --label.prompt.",
        )
        content = path.read_bytes()
        try:
            template = content.decode()
        except UnicodeDecodeError:
            template = ""
        require(
            template.count(_TEXT) == 1,
            f"label.prompt {name}",
            f"{template.count(_TEXT)} times {_TEXT}",
            f"a file in UTF-8 with {_TEXT} once, where the text stands",
            "Correct the file.",
        )
        return cls(template=template, sha256=hashlib.sha256(content).hexdigest())

    def message(self, text: str) -> str:
        """What a teacher is sent for a text."""
        return self.template.replace(_TEXT, text)
