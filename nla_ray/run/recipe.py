"""The recipe of an artifact: the part of its configuration that decides what it holds.

A manifest records the whole configuration; two configurations ask for the same artifact when their
recipes are equal. What a run is cut into, where it computes and how often it saves may change while
it goes on. This module is the one place that says which setting is which.

It protects the rule that one recipe gives one result, up to the rounding of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from nla_ray.settings.config import PretrainRunConfig, to_dict

TRAINING_DTYPE = "base.training_dtype"
_FAMILIES = "corpus.families"

NOT_IN_RECIPE: dict[str, str] = {
    "base.device": "where it computes; in which types is said by dtype and training_dtype",
    "base.engine": (
        "in float32 greedy text is the same by each, and samples are draws of one distribution;"
        " descriptions in a file name the engine in their protocol"
    ),
    "corpus.shard_rows": "how the same rows are cut into files",
    "capture.batch_tokens": "a text's activation is its own, whatever is padded beside it",
    "capture.num_actors": "shards are captured one by one",
    "label.prompt": "the hash of its file is among the inputs, where a teacher is asked",
    "label.store": "where answers lie; which are taken is said by teachers and prompt",
    "label.max_usd": "it stops the job, and shapes no label",
    "label.prices": "what labels cost, and not what they say",
    "label.requests_per_minute": "when a teacher is asked, and not what",
    "label.tokens_per_minute": "when a teacher is asked, and not what",
    "label.max_concurrency": "every text is described by itself",
    "label.timeout_seconds": "how long an answer is waited for",
    "sft.name": "the folder's name, which the manifest says by itself",
    "grpo.name": "the folder's name, which the manifest says by itself",
    "grpo.micro_batch_size": (
        "TRL's dr_grpo divides the summed loss of a micro-batch by its rows and a constant, and all"
        " micro-batches of a step have as many rows: their mean is the loss of the whole step."
        " Rewards are normalised before the step is cut"
    ),
    "grpo.save_steps": "a run that goes on meets the state and the batches that it would have met",
    "grpo.num_rollout_actors": "every rollout is drawn by a seed of its step, row and number",
    "grpo.num_scorer_actors": "every description is scored by itself",
    "evaluation.batch_size": "every description is written and read by itself",
    "evaluation.min_documents": "it refuses a report, and shapes none",
    "evaluation.gates": "verdicts on figures; under other gates a report is made anew",
    "evaluation.differences": "a further section, and files of its own; as with the gates",
    "evaluation.min_claim_confidence": "a further row of the same descriptions; as with the gates",
    "pretrain.compile": "the same sums in another order",
    "pretrain.checkpoint_seconds": "a run that goes on meets the state that it would have met",
    "pretrain.install": "a copy in the package is no other model",
}
"""Settings that change no result, with the reason. Every other one is part of the recipe.

Some that look alike stay in it. A `batch_size` of training is the optimizer's step;
`grpo.monitor_steps` and `grpo.monitor_activations` choose the checkpoint; `pretrain.num_processes`
is what losses are normalised in: each process divides by the weights of its own rows.
"""

_INJECTION = ("base.injected", "base.further_layers", "base.further_norms")
"""What a verbalizer's prompt holds beside the norm and the marker."""

NOT_OF_ARTIFACT: dict[str, tuple[str, ...]] = {
    # The base reads the text as it is, in base.dtype: nothing is injected, nothing trained.
    # How long answers are is said by the answers, a parent where there are any.
    "activations": (
        "base.injection_norm",
        *_INJECTION,
        "base.marker",
        TRAINING_DTYPE,
        "capture.answer_tokens",
    ),
    # The whole base answers; which tokens and layers are kept of it is said by the activations.
    "answers": (
        "base.layer",
        "base.injection_norm",
        *_INJECTION,
        "base.marker",
        TRAINING_DTYPE,
        "capture.positions",
        "capture.layers",
        "capture.text_mean",
    ),
    # They read descriptions and inject nothing.
    "reward_scorer": _INJECTION,
    "judge_scorer": _INJECTION,
    # It takes the judge's documents and labels, and solves for its weights: a layer's each.
    "linear_scorer": (
        "base.injected",
        "base.further_norms",
        TRAINING_DTYPE,
        "judge_scorer.lora",
        "judge_scorer.epochs",
        "judge_scorer.batch_size",
        "judge_scorer.learning_rate",
        "judge_scorer.contrastive_weight",
        "judge_scorer.max_examples",
    ),
}
"""Settings in an artifact's sections that shape others, and not this one."""


def recipe_of(artifact: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in the configuration of an artifact, a dictionary of sections as `to_dict` writes.

    A setting that is newer than the configuration has its default: what was done before it existed.

    >>> recipe = recipe_of("activations", {"capture": {"positions": "last", "num_actors": 9}})
    >>> recipe["capture"]
    {'positions': 'last', 'layers': [], 'text_mean': False}
    """
    dropped = {*NOT_IN_RECIPE, *NOT_OF_ARTIFACT.get(artifact, ())}
    return _without(with_defaults(config), dropped)


def recipe_differences(
    artifact: str, stored: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
    """In what two configurations ask for different artifacts: readable lines, none for the same.

    A stored `auto` is a precision that was not written down: any is taken for the same. A corpus
    made before there were families is taken as it is too: its documents are all families.
    """
    old, new = recipe_of(artifact, stored), recipe_of(artifact, current)
    untold = set()
    if old.get("base", {}).get("training_dtype") == "auto":
        untold.add(TRAINING_DTYPE)
    if "families" not in stored.get("corpus", {}):
        untold.add(_FAMILIES)
    return config_differences(_without(old, untold), _without(new, untold))


def config_differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Readable differences of two nested configurations, a line each.

    >>> config_differences({"grpo": {"steps": 80, "seed": 0}}, {"grpo": {"steps": 20, "seed": 0}})
    ['grpo.steps: there 80, here 20']
    """
    lines = []
    for key in sorted({*stored, *current}):
        old, new = stored.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_differences(old, new, f"{prefix}{key}.")
            continue
        shown_old = repr(old) if key in stored else "nothing"
        shown_new = repr(new) if key in current else "nothing"
        if shown_old != shown_new:
            lines.append(f"{prefix}{key}: there {shown_old}, here {shown_new}")
    return lines


def _default_sections() -> dict[str, Any]:
    """The sections of a configuration at the defaults of their fields."""
    return {
        section.name: to_dict(section.default_factory())
        for section in dataclasses.fields(PretrainRunConfig)
        if section.default_factory is not dataclasses.MISSING
    }


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as a manifest holds them, with the defaults of settings that it is older than.

    >>> with_defaults({"readable_labels": {"least": 0.9, "seed": 0}})
    {'readable_labels': {'least': 0.9, 'fill_to': 0, 'seed': 0}}
    """
    return _filled(config, _default_sections())


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with the defaults of the fields that they lack; no section is added."""
    filled = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value = {**default, **_filled(value, default)}
        filled[key] = value
    return filled


def _without(values: Mapping[str, Any], dropped: Collection[str], prefix: str = "") -> dict:
    """The nested values but for those whose dotted name is in `dropped`."""
    kept = {}
    for key, value in values.items():
        if f"{prefix}{key}" not in dropped:
            is_inner = isinstance(value, dict)
            kept[key] = _without(value, dropped, f"{prefix}{key}.") if is_inner else value
    return kept
