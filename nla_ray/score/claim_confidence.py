"""How likely each claim of a description is in its text, from all that speaks for it.

Three witnesses: the verbalizer (the log-probability with which it said the claim), its further
samples (the share that claims it too) and a linear probe (the probability of its words in the
activation's text). One logistic regression makes a probability of them; it is fitted to
descriptions of activations that nothing was trained on and whose texts are known. Pure: it knows
neither models nor runs, and texts only where it is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nla_ray.base.encoding import token_ends
from nla_ray.score import claims
from nla_ray.score.cross_fit import CalibratedProbe
from nla_ray.score.logistic import fit_logistic
from nla_ray.score.probe import BLOCK_ROWS, WordProbe
from nla_ray.score.readable import leave_out

INPUTS = ("constant", "log_prob", "agreement", "probe", "unknown")
"""What a probability is computed from, in the order of the weights."""
CONFIDENCE_NAME = "claim_confidence.safetensors"
_WORDS = "words"
"""Key of the file's metadata: the words of the probe."""
_LEAST_LOG_PROB = -10.0
_LEAST_PROBABILITY = 1e-3


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a description, and what speaks for it.

    Example: Claim(word="frame", log_prob=-0.2, agreement=0.75, probability=0.6)
    """

    word: str
    log_prob: float
    """Of all its tokens together, given the activation and what was said before."""
    agreement: float
    """Share of further samples of the same activation that claim it too."""
    probability: float | None
    """By the probe; None: it does not know the word."""


def claims_of(
    description: str,
    log_probs: Mapping[str, float],
    samples: Sequence[str],
    probability: Mapping[str, float],
) -> list[Claim]:
    """The claims of a description in the order in which they are said.

    `log_probs`: of its claims. `samples`: further descriptions of the activation, at least one.
    `probability`: of the words that the probe knows; a quotation has that of its least likely word.

    >>> claims_of("- tokens: frame", {"frame": -0.2}, ["- tokens: index, frame"], {"frame": 0.6})
    [Claim(word='frame', log_prob=-0.2, agreement=1.0, probability=0.6)]
    """
    claimed = [claims.claimed_words(sample) for sample in samples]
    return [
        Claim(
            word=word,
            log_prob=log_probs[word],
            agreement=sum(word in said for said in claimed) / len(claimed),
            probability=_probability(word, probability),
        )
        for word in claims.claim_spans(description)
    ]


def _probability(word: str, probability: Mapping[str, float]) -> float | None:
    words = [word] if word in probability else claims.word_pieces(word)
    known = [probability[part] for part in words if part in probability]
    return min(known) if known else None


def claim_log_probs(
    token_ids: Sequence[int], log_probs: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> dict[str, float]:
    """Log-probability of every claim in what these ids decode to: that of its tokens, added up.

    >>> spelled = ["- tokens:", " fr", "ame"]
    >>> decode = lambda ids: "".join(spelled[i] for i in ids)
    >>> claim_log_probs([0, 1, 2], [-0.1, -1.0, -0.5], decode)
    {'frame': -1.5}
    """
    ends = token_ends(token_ids, decode)
    return {
        word: sum(
            log_prob
            for first, last, log_prob in zip(ends, ends[1:], log_probs, strict=False)
            if first < end and last > begin
        )
        for word, (begin, end) in claims.claim_spans(decode(token_ids)).items()
    }


@dataclass(frozen=True, kw_only=True)
class ClaimConfidence:
    """The probe that is asked, and weights of a logistic regression over INPUTS.

    Example: probe=<of ["frame"]>, weights=tensor([0.4, 0.2, 1.1, 0.7, -0.3])
    """

    probe: CalibratedProbe
    weights: Float[Tensor, " inputs"]

    @classmethod
    def fit(
        cls, probe: CalibratedProbe, said: Sequence[Claim], found: Sequence[bool]
    ) -> ClaimConfidence:
        """The most likely weights. `found`: whether the text of each claim has it."""
        weights = fit_logistic(_inputs(said), torch.tensor(found, dtype=torch.float64))
        return cls(probe=probe, weights=weights.float())

    def probabilities(self, said: Sequence[Claim]) -> Float[Tensor, " claims"]:
        """That each claim is in its text."""
        return torch.sigmoid(_inputs(said) @ self.weights)

    def by_claim(
        self,
        activations: Float[Tensor, "rows d_model"],
        descriptions: Sequence[str],
        log_probs: Sequence[Mapping[str, float]],
        samples: Sequence[Sequence[str]],
    ) -> list[dict[str, float]]:
        """The same of every claim of each row's description, in the order in which it is said.

        What it is computed from: see `gather_claims`. It was fitted to greedy descriptions.
        """
        said = gather_claims(self.probe, activations, descriptions, log_probs, samples)
        likely = iter(self.probabilities([claim for row in said for claim in row]).tolist())
        return [{claim.word: next(likely) for claim in row} for row in said]

    def save(self, folder: Path) -> None:
        """Write `claim_confidence.safetensors`."""
        words = self.probe.probe
        tensors = {
            "weights": self.weights,
            "coefficients": self.probe.coefficients,
            "log_odds": self.probe.log_odds,
            "probe": words.weight,
            "feature_mean": words.feature_mean,
            "mean": words.mean,
        }
        parts = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(parts, folder / CONFIDENCE_NAME, metadata={_WORDS: json.dumps(words.words)})

    @classmethod
    def load(cls, folder: Path) -> ClaimConfidence:
        """What `save` has written."""
        with safe_open(folder / CONFIDENCE_NAME, framework="pt") as file:
            words, part = json.loads(file.metadata()[_WORDS]), file.get_tensor
            probe = WordProbe(
                words=words,
                weight=part("probe"),
                feature_mean=part("feature_mean"),
                mean=part("mean"),
            )
            calibrated = CalibratedProbe(
                probe=probe, log_odds=part("log_odds"), coefficients=part("coefficients")
            )
            return cls(probe=calibrated, weights=part("weights"))


def without_unlikely(description: str, likely: Mapping[str, float], least: float) -> str:
    """What is left of a description without claims of a lower probability: see `leave_out`.

    >>> without_unlikely("- tokens: frame, licence", {"frame": 0.9, "licence": 0.2}, 0.5)
    '- tokens: frame'
    """
    return leave_out(description, [claim for claim, p in likely.items() if p < least])


def gather_claims(
    probe: CalibratedProbe,
    activations: Float[Tensor, "rows d_model"],
    descriptions: Sequence[str],
    log_probs: Sequence[Mapping[str, float]],
    samples: Sequence[Sequence[str]],
) -> list[list[Claim]]:
    """The claims of each row's description, with all that speaks for them: see `claims_of`.

    `log_probs`: of the claims of each row's description. `samples`: further ones of each row.
    """
    number_of = {word: number for number, word in enumerate(probe.probe.words)}
    said: list[list[Claim]] = []
    for start in range(0, len(descriptions), BLOCK_ROWS):
        block = probe.probabilities(activations[start : start + BLOCK_ROWS])
        for row, probabilities in enumerate(block, start):
            words = {*claims.word_pieces(descriptions[row]), *log_probs[row]} & number_of.keys()
            known = {word: probabilities[number_of[word]].item() for word in words}
            said.append(claims_of(descriptions[row], log_probs[row], samples[row], known))
    return said


def _inputs(said: Sequence[Claim]) -> Float[Tensor, "claims inputs"]:
    """What speaks for each claim, in the order of INPUTS."""
    known = [0.5 if claim.probability is None else claim.probability for claim in said]
    columns = torch.tensor(
        [
            [1.0] * len(said),
            [max(claim.log_prob, _LEAST_LOG_PROB) for claim in said],
            [claim.agreement for claim in said],
            torch.logit(torch.tensor(known), eps=_LEAST_PROBABILITY).tolist(),
            [float(claim.probability is None) for claim in said],
        ]
    )
    return columns.T
