"""Raw labels by teachers over the network, with labels of other sources beside them.

First every teacher is asked about every subject that the store has no answer on, then the model
that cleans, if there is one. After that labels are looked up: what has none is listed with its
reason. It knows subjects and the store; runs are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nla_ray.label.asking import AskedTeacher, ask_teachers
from nla_ray.label.cleaner import clean_label
from nla_ray.label.instructions import CLEANER_PROMPT, TeacherPrompt
from nla_ray.label.rewriting import MAX_REWRITINGS, Rewriter
from nla_ray.label.store import AnswerStore
from nla_ray.label.subjects import Subject
from nla_ray.run.log import get_logger, stage_progress
from nla_ray.settings.config import LabelConfig

logger = get_logger(__name__)

RawLabels = Callable[[Subject], Sequence[tuple[str, str]]]
"""A subject -> its raw labels as (teacher, raw label)."""
SubjectPass = Callable[[], Iterable[list[Subject]]]
"""Makes one pass over the subjects of every text."""
NOTHING_LEFT = "nothing is left after cleaning"


@dataclass(frozen=True, kw_only=True)
class UnlabelledSubject:
    """A subject without the label of a teacher on the network.

    Example: UnlabelledSubject(text_id="a#0", domain="licence", position=None,
    teacher="openai:gpt-6-sol", reason="refusal", detail="")
    """

    text_id: str
    domain: str
    position: int | None
    teacher: str
    reason: str
    detail: str
    """What the provider said of it."""


class NetworkLabels:
    """The labels of a configuration that names models over the network.

    `others`: labels of offline teachers, or imported ones. `left_out`: text id -> why nobody is
    asked about it; a pass over the subjects may fill it.
    """

    def __init__(
        self,
        config: LabelConfig,
        store: AnswerStore,
        others: RawLabels,
        left_out: Mapping[str, str],
    ) -> None:
        self._config, self._store, self._others = config, store, others
        self._left_out = left_out
        self._teachers = AskedTeacher.all_of(config)
        self._rewriter = _rewriter(config, store)
        self._failures: dict[str, str] = {}
        self.refused: list[UnlabelledSubject] = []
        """What `raw_labels` found no label of."""
        self.metrics: dict[str, Any] = {}
        """What was asked, by teacher."""

    def ask(self, subjects: SubjectPass, num_texts: int) -> None:
        """Ask whatever has no answer. Raises ValueError as `ask_teachers` does."""
        logger.info("labels: %d answers are in %s", len(self._store), self._store.location)
        if self._store.num_unsettled:
            logger.warning(
                "labels: %d requests were under way when this job was last stopped; they count as"
                " spent, and are made again where their answer is missing",
                self._store.num_unsettled,
            )
        self._ask(
            self._teachers, lambda read: [subject.read for subject in read], subjects, num_texts
        )
        if self._rewriter is not None:
            for _ in range(MAX_REWRITINGS):
                cleaner = [self._rewriter.cleaner]
                self._ask(cleaner, self._still_to_clean, subjects, num_texts)

    def raw_labels(self, subject: Subject) -> list[tuple[str, str]]:
        """The raw labels of a subject; what it lacks is added to `refused`."""
        found = list(self._others(subject))
        for teacher in self._teachers:
            text, reason = self._look_up(teacher, subject)
            if not reason:
                found.append((teacher.teacher.name, text))
                continue
            kind, _, detail = reason.partition(" (")
            self.refused.append(
                UnlabelledSubject(
                    text_id=subject.text["text_id"],
                    domain=subject.text["domain"],
                    position=subject.position,
                    teacher=teacher.teacher.name,
                    reason=kind,
                    detail=detail.removesuffix(")"),
                )
            )
        return found

    def clean(self, raw: str, max_words: int) -> str:
        """The bullets of a raw label, by the configured cleaner."""
        if self._rewriter is None:
            return clean_label(raw, max_words)
        label = self._rewriter.clean(raw, max_words)
        self.metrics["cleaner"] = dict(self._rewriter.counts)
        return label

    def _ask(
        self,
        teachers: Sequence[AskedTeacher],
        texts_of: Callable[[list[Subject]], Iterable[str]],
        subjects: SubjectPass,
        num_texts: int,
    ) -> None:
        """Ask some teachers about what `texts_of` finds in the subjects of a text."""
        if not teachers:
            return
        names = ", ".join(teacher.teacher.name for teacher in teachers)
        with stage_progress(f"texts read by {names}", num_texts * len(teachers)) as advance:

            def texts() -> Iterator[str]:
                for of_text in subjects():
                    yield from texts_of(of_text)
                    advance(note=f"{self._store.spent_usd:.2f} US dollars")

            asked = ask_teachers(teachers, texts, self._store, self._config)
        self._failures |= asked.failures
        for name, counts in asked.counts.items():
            before = self.metrics.setdefault(name, dict.fromkeys(asdict(counts), 0))
            self.metrics[name] = {key: before[key] + value for key, value in asdict(counts).items()}

    def _look_up(self, teacher: AskedTeacher, subject: Subject) -> tuple[str, str]:
        """A teacher's raw label and an empty reason; or why there is none."""
        key = teacher.key(subject.read)
        answer = self._store.get(key)
        if answer is None:
            left_out = self._left_out.get(subject.text["text_id"])
            return "", left_out or self._failures.get(key, "not asked")
        if not answer.fault and not clean_label(answer.text):
            return "", NOTHING_LEFT
        return answer.text, answer.fault

    def _still_to_clean(self, subjects: list[Subject]) -> Iterator[str]:
        assert self._rewriter is not None
        for subject in subjects:
            raw = [label for _, label in self._others(subject)]
            for teacher in self._teachers:
                text, reason = self._look_up(teacher, subject)
                raw += [] if reason else [text]
            yield from self._rewriter.still_to_ask(raw)


def _rewriter(config: LabelConfig, store: AnswerStore) -> Rewriter | None:
    if config.asked_cleaner is None:
        return None
    prompt = TeacherPrompt.load(CLEANER_PROMPT)
    cleaner = AskedTeacher.of(config.asked_cleaner, prompt, config)
    return Rewriter(cleaner=cleaner, store=store, max_words=config.max_words)
