"""Ceilings and the control that are matched to what a verbalizer says of the same activation.

    source_text     the text itself: no description says more
    source_summary  sentences of the text, as many tokens as the verbalizer wrote
    linear_probe    the best words of a linear probe, as many as the verbalizer claims
    linear_label    the same words in the form of a label: with the kind of text and the
                    continuation that linear probes read, in the words of train labels

They read texts, labels and activations, no scorer. The probes learn from train rows, and their
penalties are chosen on validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations
from nla_ray.description.record import Description
from nla_ray.label.stage import activation_subjects, drawn_labels
from nla_ray.report.controls import CONTROLS, SOURCE
from nla_ray.report.evaluated import Evaluated
from nla_ray.report.lengths import cut_texts
from nla_ray.run.artifact import Run
from nla_ray.score import claims
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.metrics import Figure
from nla_ray.score.probe import fit_classes, fit_probe, share_in_text, words_as_bullets
from nla_ray.text.summary import extract_summary
from nla_ray.text.words import WordStatistics, salient_words

SALIENT_WORDS = 12
"""Words of a text that its description might be expected to name."""
MOST_PROBED = 64
"""Words that the probe ranks of an activation; a description that claims more is matched by these.
"""
_CURVE_WORDS = 8
"""Most claims of a description on the curve of words."""
_LEAST_GROWTH = 0.05
"""Of the mean number of claims, for a further point of it."""
PROBE_FIGURES = (
    "words",
    "precision",
    "probe_precision",
    "difference",
    "true_words",
    "probe_true_words",
)
"""Words that a description claims; share of them in the text, and of as many words of the probe;
the two shares' paired difference; and how many words of a description are in the text."""


@dataclass(frozen=True, kw_only=True)
class TrainWords:
    """What the train rows teach of words: how rare each is, and how activations tell of it."""

    statistics: WordStatistics
    """Of the train texts, each once."""
    probed: Sequence[Sequence[str]]
    """Words that a linear probe reads in each test activation, best first."""
    frames: Sequence[tuple[str, str]]
    """What linear probes read as each one's kind of text and continuation; "": labels name none."""

    def salient(self, texts: Sequence[str]) -> list[list[str]]:
        """The most salient words of each text, the best first."""
        return [
            [word for word, _ in salient_words(text, self.statistics, SALIENT_WORDS)]
            for text in texts
        ]


def train_words(
    run: Run, train: ActivationTable, test: ActivationTable, mean: Tensor
) -> TrainWords:
    """Fit word statistics and the probe. `mean`: mu."""
    whole: dict[str, str] = {}
    for text_id, text in zip(train.text_ids, train.texts, strict=True):
        if len(text) >= len(whole.get(text_id, "")):  # of several positions, the last
            whole[text_id] = text
    validation = load_activations(run, "validation")
    probe = fit_probe(train.vectors, train.texts, validation.vectors, validation.texts, mean)
    return TrainWords(
        statistics=WordStatistics.fit(list(whole.values())),
        probed=probe.rank(test.vectors, MOST_PROBED),
        frames=_read_frames(run, train, validation, test, mean),
    )


def _read_frames(
    run: Run,
    train: ActivationTable,
    validation: ActivationTable,
    test: ActivationTable,
    mean: Tensor,
) -> list[tuple[str, str]]:
    """The kind of text and the continuation of each test activation, by probes of train labels."""
    frames = []
    for table, split in ((train, "train"), (validation, "validation")):
        labels = drawn_labels(run, split)
        subjects = activation_subjects(run, table)
        frames.append([claims.frame_of(labels.get(subject, "")) for subject in subjects])
    read = [
        fit_classes(
            train.vectors,
            [frame[part] for frame in frames[0]],
            validation.vectors,
            [frame[part] for frame in frames[1]],
            mean,
        ).most_likely(test.vectors)
        for part in (0, 1)
    ]
    return list(zip(*read, strict=True))


def matched_descriptions(
    words: TrainWords, tokenizer: Any, texts: Sequence[str], described: Sequence[Description]
) -> dict[str, list[str]]:
    """What the ceilings and the probe say of every row, as long as `described` is there."""
    summaries = [extract_summary(text, words.statistics) for text in texts]
    lengths = [description.num_tokens or 0 for description in described]
    counts = _claim_counts(described)
    best = [probed[:count] for probed, count in zip(words.probed, counts, strict=True)]
    framed = [_framed(named, *frame) for named, frame in zip(best, words.frames, strict=True)]
    return {
        SOURCE: list(texts),
        "source_summary": cut_texts(tokenizer, summaries, lengths),
        "linear_probe": [words_as_bullets(named) for named in best],
        **({"linear_label": framed} if any(map(any, words.frames)) else {}),
    }


def _framed(words: Sequence[str], kind: str, continuation: str) -> str:
    """Words, the kind of text, and the continuation as bullets; the best word tells of the kind."""
    topic, tokens = (words[:1], words[1:]) if kind else ([], words)
    lines = [words_as_bullets(tokens)] if tokens else []
    if kind:
        lines.append(f"- {kind}: {', '.join(topic) or claims.PLACEHOLDERS[-1]}")
    if continuation:
        lines.append(f"- {claims.NEXT_HEADING}: {continuation}")
    return "\n".join(lines)


def probe_section(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, Any]:
    """verbalizer -> figure of PROBE_FIGURES; of the gold labels too, of no control."""
    if not evaluated.probed:
        return {}
    section = {}
    for name, described in evaluated.descriptions.items():
        if name in CONTROLS:
            continue
        claimed = _claim_counts(described)
        counts = torch.tensor(claimed, dtype=torch.float64)
        precision = evaluated.claims[name]["precision"].numerator
        by_probe = torch.tensor(_probe_precision(evaluated, claimed), dtype=torch.float64)
        columns = [counts, precision, by_probe, precision - by_probe]
        columns += [precision * counts, by_probe * counts.clamp(max=MOST_PROBED)]
        named = zip(PROBE_FIGURES, map(Figure.mean, columns), strict=True)
        section[name] = bootstrap.intervals(dict(named))
    return section


def word_curve(bootstrap: FamilyBootstrap, evaluated: Evaluated) -> dict[str, list[dict[str, Any]]]:
    """verbalizer -> for 1, 2, ... claims of a description `words`, their mean, and `found`.

    `found`: share of all these claims that the texts have. A description's first claims count as
    they are said, of the probe its best words, as many a row as GRPO's verbalizer claims there. A
    line ends where descriptions hardly claim more, or at _CURVE_WORDS.
    """
    if not evaluated.probed:
        return {}
    counts = _claim_counts(evaluated.descriptions[evaluated.sampled])
    matched = zip(evaluated.probed, counts, strict=True)
    written = {"linear_probe": [words_as_bullets(row[:count]) for row, count in matched]}
    written |= {
        name: evaluated.texts_of(name) for name in evaluated.descriptions if name not in CONTROLS
    }
    curves = {}
    for name, descriptions in written.items():
        outcomes = map(claims.claim_outcomes, descriptions, evaluated.texts)
        curves[name] = _curve_of(bootstrap, [list(row.values()) for row in outcomes])
    return curves


def _curve_of(
    bootstrap: FamilyBootstrap, outcomes: Sequence[Sequence[bool]]
) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    for most in range(1, _CURVE_WORDS + 1):
        counts = torch.tensor([min(most, len(row)) for row in outcomes], dtype=torch.float64)
        words = counts.mean().item()
        if not words or (points and words < points[-1]["words"] + _LEAST_GROWTH):
            break
        right = torch.tensor([sum(row[:most]) for row in outcomes], dtype=torch.float64)
        points.append({"words": words, **bootstrap.intervals({"found": Figure(right, counts)})})
    return points


def _claim_counts(described: Sequence[Description]) -> list[int]:
    return [len(claims.claimed_words(description.text)) for description in described]


def _probe_precision(evaluated: Evaluated, counts: Sequence[int]) -> list[float]:
    """Share of the probe's best words, so many a row, that the text has; of none it is 0."""
    rows = zip(evaluated.probed, counts, evaluated.texts, strict=True)
    return [share_in_text(words[:count], text) for words, count, text in rows]
