"""What the confidence of claims is worth: whether claims of .8 are in their texts .8 of the time.

Pure: it is given probabilities and outcomes. Claims are counted, each by itself; intervals draw
families, as everywhere. What is judged was fitted elsewhere: the weights to validation activations,
the probe to train activations; `gathering` sees to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nla_ray.base.encoding import encode_texts
from nla_ray.description.record import Description
from nla_ray.score import claims
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.claim_confidence import ClaimConfidence, without_unlikely
from nla_ray.score.metrics import Figure

KEPT_FROM = {f"kept_{percent}": percent / 100 for percent in (50, 60, 70, 80, 90)}
"""Confidences from which claims are kept, by the name of their figures."""
KEPT_FIGURES = ("share", "precision")
_BINS = 10
_LEAST_KEPT = 20


@dataclass(frozen=True, kw_only=True)
class JudgedClaims:
    """The claims of descriptions, row by row: how likely each is, and whether its text has it.

    Example: probabilities=[tensor([0.9, 0.2])], found=[tensor([1.0, 0.0])]
    """

    probabilities: Sequence[Float[Tensor, " claims"]]
    found: Sequence[Float[Tensor, " claims"]]


def claim_probabilities(
    confidence: ClaimConfidence,
    activations: Float[Tensor, "rows d_model"],
    described: Sequence[Description],
    samples: Sequence[Sequence[Description]],
) -> list[dict[str, float]] | None:
    """Of each row's claims; None where descriptions were kept without their log-probabilities.

    That is before they were kept, or before claims were cut out of a description as they are now.
    """
    log_probs = [description.claim_log_probs or {} for description in described]
    descriptions = [description.text for description in described]
    spans = map(claims.claim_spans, descriptions)
    if any(kept.keys() != now.keys() for kept, now in zip(log_probs, spans, strict=True)):
        return None
    drawn_texts = [[sample.text for sample in drawn] for drawn in samples]
    return confidence.by_claim(activations, descriptions, log_probs, drawn_texts)


def judged_claims(
    probabilities: Sequence[Mapping[str, float]], descriptions: Sequence[str], texts: Sequence[str]
) -> JudgedClaims:
    """The claims of each row, looked up in its text."""
    outcomes = map(claims.claim_outcomes, descriptions, texts)
    return JudgedClaims(
        probabilities=[_column(row.values()) for row in probabilities],
        found=[_column(row.values()) for row in outcomes],
    )


def confident_descriptions(
    tokenizer: Any,
    described: Sequence[Description],
    probabilities: Sequence[Mapping[str, float]],
    least: float,
) -> list[Description]:
    """What is left of each description without the claims that are less likely than this."""
    texts = [
        without_unlikely(description.text, row, least)
        for description, row in zip(described, probabilities, strict=True)
    ]
    return [
        dataclasses.replace(description, text=text, num_tokens=len(ids), claim_log_probs=None)
        for description, text, ids in zip(
            described, texts, encode_texts(tokenizer, texts), strict=True
        )
    ]


def _column(values: Iterable[float]) -> Float[Tensor, " claims"]:
    return torch.tensor(list(values), dtype=torch.float64)


def claim_confidence_section(
    bootstrap: FamilyBootstrap, judged: JudgedClaims | None
) -> dict[str, Any]:
    """`kept_80` and the like, `brier`, `calibration_error` and `bins`; empty without claims.

    `kept_80`: of the claims from .8 on their `share` of all, and their `precision`, which has no
    honest interval where few are kept.
    `brier_constant` is the Brier score of whoever gives every claim the share that is found.
    """
    if judged is None or not sum(len(row) for row in judged.found):
        return {}
    flat = torch.cat(list(judged.probabilities)), torch.cat(list(judged.found))
    share = flat[1].mean()
    every = [torch.ones(len(row), dtype=torch.float64) for row in judged.found]
    pairs = list(zip(judged.probabilities, judged.found, strict=True))
    section: dict[str, Any] = {"claims": len(flat[0])}
    for name, least in KEPT_FROM.items():
        kept = [(likely >= least).double() for likely in judged.probabilities]
        right = [chosen * found for chosen, found in zip(kept, judged.found, strict=True)]
        named = {"share": _over(kept, every)}
        if sum(row.sum() for row in kept) >= _LEAST_KEPT:
            named["precision"] = _over(right, kept)
        section[name] = bootstrap.intervals(named)
    section |= bootstrap.intervals(
        {
            "brier": _over([(likely - found).square() for likely, found in pairs], every),
            "brier_constant": _over([(share - found).square() for _, found in pairs], every),
        }
    )
    section["bins"] = _bins(bootstrap, judged)
    section["calibration_error"] = sum(
        bin["claims"] * abs(bin["confidence"] - bin["found"].value) for bin in section["bins"]
    ) / len(flat[0])
    return section


def _bins(bootstrap: FamilyBootstrap, judged: JudgedClaims) -> list[dict[str, Any]]:
    """The claims of each tenth of the confidence that has any: their mean, and the share found."""
    bins = []
    for number in range(_BINS):
        inside = [
            ((_BINS * likely).floor().clamp(max=_BINS - 1) == number).double()
            for likely in judged.probabilities
        ]
        count = int(sum(row.sum() for row in inside))
        if not count:
            continue
        found = [chosen * row for chosen, row in zip(inside, judged.found, strict=True)]
        likely = [chosen * row for chosen, row in zip(inside, judged.probabilities, strict=True)]
        bins.append(
            {
                "claims": count,
                "confidence": (sum(row.sum() for row in likely) / count).item(),
                **bootstrap.intervals({"found": _over(found, inside)}),
            }
        )
    return bins


def _over(numerators: Sequence[Tensor], denominators: Sequence[Tensor]) -> Figure:
    """A ratio of sums over the claims of each row."""
    return Figure(
        torch.stack([row.sum() for row in numerators]),
        torch.stack([row.sum() for row in denominators]),
    )
