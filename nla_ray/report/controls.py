"""Who describes the test activations: the trained verbalizers, the gold labels, and the controls
they must beat.

    gold                 the label drawn for the same text: the ceiling
    nearest_train_label  the label of the nearest train activation: what a verbalizer must beat to
                         be worth training
    shuffled             another test document's gold label
    generic              one fixed sentence
    mean_activation      the SFT verbalizer, given the train mean
    random_vector        the SFT verbalizer, given a random vector of the same norm

It decides what is described and what is injected; models, files and figures are elsewhere. No
description is dropped: a text without a label is described by the empty string.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from nla_ray.base.prompts import GENERIC_DESCRIPTION
from nla_ray.run.identity import seed_of
from nla_ray.score.metrics import derangement, nearest_rows

SCORERS = ("reward", "judge", "linear")
"""Who scores; the artifact of each is `{scorer}_scorer`."""
TRAINED = ("sft", "grpo", "grpo_no_contrast")
"""Artifacts that are verbalizers. The last is the ablation arm; it is in the table when its
artifact exists."""
INJECTED = ("mean_activation", "random_vector")
VERBALIZERS = ("gold", "nearest_train_label", *TRAINED, "shuffled", "generic", *INJECTED)
"""In the order of the report's tables."""
CONTROLS = tuple(name for name in VERBALIZERS if name not in ("gold", *TRAINED))
_SHUFFLE_SEED = 7_919
"""Keeps the shuffled labels' derangement apart from the one that chooses the wrong row: else the
two would match."""


def trained_in(artifacts: Collection[str]) -> list[str]:
    """Which artifacts of a run are verbalizers, SFT first: also arms of GRPO that have a name of
    their own."""
    return [
        *(name for name in TRAINED if name in artifacts),
        *sorted(name for name in artifacts if name.startswith("grpo") and name not in TRAINED),
    ]


def label_descriptions(
    name: str, text_ids: Sequence[str], doc_ids: Sequence[str], gold: Mapping[str, str], seed: int
) -> list[str]:
    """One description for every test row from labels alone: control `gold`, `shuffled` or
    `generic`.

    `gold`: the drawn label by text_id.
    """
    own = [gold.get(text_id, "") for text_id in text_ids]
    if name == "gold":
        return own
    if name == "generic":
        return [GENERIC_DESCRIPTION] * len(own)
    if name == "shuffled":
        return [own[row] for row in derangement(doc_ids, seed + _SHUFFLE_SEED).tolist()]
    raise ValueError(
        f"label control: got {name!r}, expected gold, shuffled or generic. Choose one of them."
    )


def nearest_train_labels(
    test: Tensor,
    train: Tensor,
    train_text_ids: Sequence[str],
    labels: Mapping[str, str],
    mean: Tensor,
) -> list[str]:
    """For every test activation the label of the nearest labelled train activation by centred
    cosine.

    Raises ValueError when no train text has a label.
    """
    labelled = [row for row, text_id in enumerate(train_text_ids) if text_id in labels]
    if not labelled:
        raise ValueError(
            f"train labels: got none for {len(train_text_ids)} captured texts, expected some. "
            "Make them with: python jobs/label.py"
        )
    known = train if len(labelled) == len(train) else train[torch.tensor(labelled)]
    return [
        labels[train_text_ids[labelled[row]]] for row in nearest_rows(test, known, mean).tolist()
    ]


def injected_vectors(
    name: str, activation_ids: Sequence[str], activations: Tensor, mean: Tensor, seed: int
) -> Tensor:
    """What is injected instead of the activations: [rows, d_model]; one row for `mean_activation`,
    the same for all.

    Injection makes its norm the activation's own, as it does with every vector.
    """
    if name == "mean_activation":
        return mean.float()[None]
    generators = (
        torch.Generator().manual_seed(seed_of(seed, name, activation_id))
        for activation_id in activation_ids
    )
    return torch.stack(
        [torch.randn(activations.shape[1], generator=generator) for generator in generators]
    )
