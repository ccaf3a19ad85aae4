"""Ceilings and the control that are matched to what a verbalizer says of the same activation.

    source_text     the text itself: no description says more
    source_summary  sentences of the text, as many tokens as the verbalizer wrote
    linear_probe    the best words of a linear probe, as many as the verbalizer claims

They read texts and activations, no scorer. The probe learns from train rows, and its penalty is
chosen on validation rows.
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
from nla_ray.report.controls import CONTROLS, SOURCE
from nla_ray.report.evaluated import Evaluated
from nla_ray.report.lengths import cut_texts
from nla_ray.run.artifact import Run
from nla_ray.score import claims
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.metrics import Figure
from nla_ray.score.probe import fit_probe, share_in_text, words_as_bullets
from nla_ray.text.summary import extract_summary
from nla_ray.text.words import WordStatistics, salient_words

SALIENT_WORDS = 12
"""Words of a text that its description might be expected to name."""
MOST_PROBED = 64
"""Words that the probe ranks of an activation; a description that claims more is matched by these.
"""
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
    )


def matched_descriptions(
    words: TrainWords, tokenizer: Any, texts: Sequence[str], described: Sequence[Description]
) -> dict[str, list[str]]:
    """What the ceilings and the probe say of every row, as long as `described` is there."""
    summaries = [extract_summary(text, words.statistics) for text in texts]
    lengths = [description.num_tokens or 0 for description in described]
    counts = _claim_counts(described)
    return {
        SOURCE: list(texts),
        "source_summary": cut_texts(tokenizer, summaries, lengths),
        "linear_probe": [
            words_as_bullets(probed[:count])
            for probed, count in zip(words.probed, counts, strict=True)
        ],
    }


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


def _claim_counts(described: Sequence[Description]) -> list[int]:
    return [len(claims.claimed_words(description.text)) for description in described]


def _probe_precision(evaluated: Evaluated, counts: Sequence[int]) -> list[float]:
    """Share of the probe's best words, so many a row, that the text has; of none it is 0."""
    rows = zip(evaluated.probed, counts, evaluated.texts, strict=True)
    return [share_in_text(words[:count], text) for words, count, text in rows]
