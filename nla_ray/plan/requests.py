"""What asking teachers over the network would take: requests, tokens, money and time.

From sizes and settings alone: what a store of answers has already is not looked up, and costs less.
"""

from __future__ import annotations

from pathlib import Path

from nla_ray.plan.facts import LABEL_TOKENS, PlanFacts
from nla_ray.plan.units import format_seconds
from nla_ray.settings.config import LabelConfig
from nla_ray.settings.teachers import TeacherName, price_of

TEACHER_PROMPT_TOKENS = 255
"""Of a prompt of this project, without the text: about."""
CLEANER_PROMPT_TOKENS = 210
ANSWER_TOKENS = 150
"""Of a teacher's answer, about; a model that thinks first writes several times as many."""
MOST_TEMPLATE_TOKENS = 64
"""Most tokens that a provider adds to one message."""
_CHARS_PER_TOKEN = 4.0


def request_lines(facts: PlanFacts) -> list[str]:
    """A line for each model that is asked, and one for the budget."""
    label = facts.config.label
    subjects = facts.texts * facts.positions_per_text
    read = facts.text_tokens + _prompt_tokens(label)
    chars = facts.config.corpus.chunk_chars + _prompt_tokens(label) * _CHARS_PER_TOKEN
    lines = []
    for teacher in label.asked:
        lines.append(_line("asked", teacher, label, subjects, read, ANSWER_TOKENS, chars))
    if label.asked_cleaner is not None:
        labels, read = facts.texts * facts.labels_per_text, ANSWER_TOKENS + CLEANER_PROMPT_TOKENS
        chars = read * _CHARS_PER_TOKEN
        lines.append(
            _line("cleaner", label.asked_cleaner, label, labels, read, LABEL_TOKENS, chars)
        )
    if label.max_usd is not None:
        lines.append(f"  budget     {label.max_usd:g} US dollars, over all starts of the job")
    return lines


def _line(
    title: str,
    teacher: TeacherName,
    label: LabelConfig,
    requests: float,
    read_each: float,
    written_each: float,
    chars_each: float,
) -> str:
    """One model: `*_each` are tokens read and written, and characters read, of a request."""
    read, written = requests * read_each, requests * min(written_each, label.answer_tokens)
    said = (
        f"  {title:<11}{teacher.name}: {requests:,.0f} requests, about {read + written:,.0f} tokens"
        f" ({written:,.0f} of answers)"
    )
    price = price_of(teacher.name, label.prices)
    if price is None:
        said += ", at a price that is not known: --label.prices TEACHER=INPUT/OUTPUT"
    else:
        # A token has a byte at least, a character of most texts is one.
        most = requests * price.usd(chars_each + MOST_TEMPLATE_TOKENS, label.answer_tokens)
        said += f", about {price.usd(read, written):,.2f} US dollars, at most {most:,.2f}"
    seconds = max(
        requests * 60 / (label.requests_per_minute or float("inf")),
        (read + written) * 60 / (label.tokens_per_minute or float("inf")),
    )
    return said + (f", {format_seconds(seconds)} at the limits" if seconds else "")


def _prompt_tokens(label: LabelConfig) -> float:
    path = Path(label.prompt).expanduser()
    return path.stat().st_size / _CHARS_PER_TOKEN if path.is_file() else TEACHER_PROMPT_TOKENS
