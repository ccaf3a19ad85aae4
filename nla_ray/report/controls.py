"""Who describes the test activations: trained verbalizers, gold labels, controls to be beaten.

    gold                 the label drawn for the same text: a ceiling
    source_text          the text itself, and
    source_summary       its best sentences, as long as what GRPO's verbalizer says: ceilings
    nearest_train_label  the label of the nearest train activation: what a verbalizer must beat to
                         be worth training
    linear_probe         as many words as GRPO's verbalizer claims, read without any verbalizer
    linear_label         these words as a label, with a kind of text and a continuation read alike
    shuffled             another test document's gold label
    generic              one fixed sentence
    mean_activation      the SFT verbalizer, given the train mean
    random_vector        the SFT verbalizer, given a random vector of the same norm

It decides what is described, what is injected and what is compared; models, files and figures are
elsewhere. No description is dropped: a text without a label is described by the empty string.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.activation.bank import ActivationTable
from nla_ray.base.prompts import GENERIC_DESCRIPTION
from nla_ray.run.identity import seed_of
from nla_ray.run.stages import artifacts_of_kind
from nla_ray.score.comparisons import derangement, nearest_rows

SCORERS = tuple(name.removesuffix("_scorer") for name in artifacts_of_kind("scorer"))
"""Who scores: reward, judge, linear. The artifact of each is `{scorer}_scorer`."""
REFRESHED = "refreshed"
"""Who reads the verbalizers alone: the reward scorer, trained on with what SFT writes."""
CONFIDENT = "confident"
"""Ends the name of an arm whose descriptions are shown without the claims it is unsure of."""
TRAINED = (*artifacts_of_kind("verbalizer"), "grpo_no_contrast")
"""Artifacts that are verbalizers: sft, grpo, and the ablation arm, shown where it was trained."""
INJECTED = ("mean_activation", "random_vector")
"""Controls that inject something other than the activation."""
SOURCE = "source_text"
"""The ceiling that is no description: what it quotes is not quoted from the text."""
VERBALIZERS = (
    "gold",
    SOURCE,
    "source_summary",
    "nearest_train_label",
    *TRAINED,
    "linear_probe",
    "linear_label",
    "shuffled",
    "generic",
    *INJECTED,
)
"""In the order of the report's tables."""
CONTROLS = tuple(name for name in VERBALIZERS if name not in ("gold", *TRAINED))
_SHUFFLE_SEED = 7_919
"""Keeps the shuffled labels apart from the choice of the wrong row: else the two would match."""
_PAIRS = (
    ("grpo", "sft"),
    ("grpo", "nearest_train_label"),
    ("sft", "nearest_train_label"),
    ("grpo", "grpo_no_contrast"),
    ("grpo_no_contrast", "sft"),
)
"""Verbalizers of the run itself that are compared row by row."""
_REFERENCES = ("grpo", "sft", "nearest_train_label")
"""What every verbalizer from elsewhere is compared with."""


def artifact_of(scorer: str) -> str:
    """The artifact of a scorer.

    >>> artifact_of("judge"), artifact_of("refreshed")
    ('judge_scorer', 'reward_scorer_refreshed')
    """
    return "reward_scorer_refreshed" if scorer == REFRESHED else f"{scorer}_scorer"


def trained_in(artifacts: Collection[str]) -> list[str]:
    """Which artifacts of a run are verbalizers, SFT first, those with names of their own last.

    >>> trained_in(["grpo_kl0", "labels", "grpo", "sft_seed1", "sft"])
    ['sft', 'grpo', 'grpo_kl0', 'sft_seed1']
    """
    stages = artifacts_of_kind("verbalizer")
    named = [name for name in artifacts if name.startswith(tuple(f"{stage}_" for stage in stages))]
    return [
        *(name for name in TRAINED if name in artifacts),
        *sorted(name for name in named if name not in TRAINED),
    ]


def pairs_of(verbalizers: Sequence[str]) -> list[tuple[str, str]]:
    """Which of these verbalizers are compared row by row.

    Both arms with SFT and with the nearest label; every verbalizer from elsewhere with those, and
    with the others from elsewhere.

    >>> pairs_of(["gold", "sft", "grpo", "theirs"])
    [('grpo', 'sft'), ('theirs', 'grpo'), ('theirs', 'sft')]
    """
    added = [name for name in verbalizers if name not in VERBALIZERS]
    with_references = [(name, reference) for name in added for reference in _REFERENCES]
    pairs = [*_PAIRS, *with_references, *combinations(added, 2)]
    return [pair for pair in pairs if set(pair) <= set(verbalizers)]


def label_descriptions(
    name: str,
    subjects: Sequence[str],
    family_ids: Sequence[str],
    gold: Mapping[str, str],
    seed: int,
) -> list[str]:
    """What `gold`, `shuffled` or `generic` says of every test row, from labels alone.

    `subjects`: what each row is about. `gold`: the label drawn for a subject. Raises ValueError for
    another name.
    """
    labels = [gold.get(subject, "") for subject in subjects]
    if name == "gold":
        return labels
    if name == "generic":
        return [GENERIC_DESCRIPTION] * len(labels)
    if name == "shuffled":
        return [labels[row] for row in derangement(family_ids, seed + _SHUFFLE_SEED).tolist()]
    raise ValueError(
        f"label control: got {name!r}, expected gold, shuffled or generic. Choose one of them."
    )


def nearest_train_labels(
    test: Tensor,
    train: Tensor,
    train_subjects: Sequence[str],
    labels: Mapping[str, str],
    mean: Tensor,
) -> list[str]:
    """For every test activation the label of the nearest labelled train activation.

    Nearest by centred cosine. `test`, `train`: [rows, d_model]. `labels`: by subject. Raises
    ValueError when no train activation has a label.
    """
    labelled = [row for row, subject in enumerate(train_subjects) if subject in labels]
    if not labelled:
        raise ValueError(
            f"train labels: got none for {len(train_subjects)} activations, expected some. "
            "Make them with: python jobs/label.py"
        )
    candidates = train if len(labelled) == len(train) else train[torch.tensor(labelled)]
    nearest = nearest_rows(test, candidates, mean).tolist()
    return [labels[train_subjects[labelled[row]]] for row in nearest]


def injected_vectors(name: str, activation_ids: Sequence[str], means: Tensor, seed: int) -> Tensor:
    """What is injected instead of the activations: [rows, vectors, d_model].

    `means` [vectors, d_model]: the train mean directions of what stands for an activation. For
    `mean_activation` these are one row, the same for all activations. Injection gives every vector
    the norm that all injected ones have.
    """
    if name == "mean_activation":
        return means.float()[None]
    drawn = []
    for activation_id in activation_ids:
        generator = torch.Generator().manual_seed(seed_of(seed, name, activation_id))
        drawn.append(torch.randn(means.shape, generator=generator))
    return torch.stack(drawn)


def injected_means(train: ActivationTable, mean: Tensor) -> Tensor:
    """The train mean directions of what stands for an activation: [vectors, d_model].

    `mean`: that of the activations.
    """
    return mean[None] if train.views is None else vectors.direction(train.views).mean(0)
