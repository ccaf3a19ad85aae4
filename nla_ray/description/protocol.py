"""How descriptions were generated: what two verbalizers must share before they are compared.

A verbalizer is its weights, so the weights of two verbalizers differ by design. The protocol of a
COMPARISON is therefore everything else: the prompt, the decoding, the limits and the engine. Where
one of these differs, a difference of two figures is no longer one of two verbalizers: a baseline
that was cut off earlier, asked in other words, or sampled, loses for reasons of its own.

A checkpoint that is trained whole brings its own prompt and norm, which are part of it as its
weights are: asked in another one's words it would be another verbalizer. Of two of which one is
such, decoding, limits, engine and layer must be the same.

What is injected is no part of it: the controls that inject something else than the activation say
so by their names. A description that no verbalizer generated (a label, a fixed sentence) has no
protocol that could differ, and is compared with any. A file of an earlier version, or from
elsewhere, may not record its protocol; nothing follows from that but that it is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nla_ray.base.load import load_model_config
from nla_ray.base.prompts import InjectionPrompt, injection_prompt
from nla_ray.base.reference import ReferenceFacts
from nla_ray.description.engines.interface import engine_name
from nla_ray.run.recipe import config_differences
from nla_ray.settings.config import BaseConfig, config_hash, require
from nla_ray.settings.views import is_activation_alone

_WEIGHTS = "weights"
"""The section that no comparison asks for."""
_OWN = "of_checkpoint"
"""In the section of the prompt, where that belongs to the weights."""
_HASH = "hash"
_BY_NOBODY = "not generated"
"""In place of the sections, where nobody's weights wrote the descriptions."""


@dataclass(frozen=True, kw_only=True)
class GenerationProtocol:
    """How the descriptions of one file were generated.

    Example: GenerationProtocol(prompt={"ids": "3f2a...", "layer": 4, "injection_norm": 50.0},
    decoding={"temperature": 0.0, "samples": 1, "seed": None}, limits={"max_new_tokens": 64},
    engine={"name": "compact", "dtype": "float32"}, weights={"base": "9c...", "adapter": "77..."})
    """

    prompt: Mapping[str, Any]
    """The hash of its token ids, the layer whose activations replace the marker, and their norm."""
    decoding: Mapping[str, Any]
    """Temperature (0: greedy), samples of each activation, and their seed (None: greedy)."""
    limits: Mapping[str, Any]
    """The most tokens that were sampled for a description."""
    engine: Mapping[str, Any]
    """What generated, and the type of its base's weights."""
    weights: Mapping[str, Any]
    """Digests of the base and of the adapter."""

    @property
    def is_generated(self) -> bool:
        """False: nobody's weights wrote the descriptions."""
        return bool(self.weights)

    @property
    def hash(self) -> str:
        """Of all sections."""
        return config_hash(dataclasses.asdict(self))

    @property
    def comparison(self) -> dict[str, Mapping[str, Any]]:
        """The sections that two verbalizers must share: all but the weights."""
        sections = dataclasses.asdict(self)
        return {name: section for name, section in sections.items() if name != _WEIGHTS}

    @property
    def comparison_hash(self) -> str:
        """Of the sections that two verbalizers must share."""
        return config_hash(self.comparison)

    def to_record(self) -> dict[str, Any] | str:
        """As a file of descriptions and a report hold it: the sections, and their hash."""
        return {_HASH: self.hash, **dataclasses.asdict(self)} if self.is_generated else _BY_NOBODY

    @classmethod
    def from_record(cls, record: Any, source: str) -> GenerationProtocol:
        """What `to_record` has written.

        Raises ValueError, naming `source`, for other sections, and for a hash of others.
        """
        if record == _BY_NOBODY:
            return NOT_GENERATED
        expected = {_HASH, *(field.name for field in dataclasses.fields(cls))}
        require(
            isinstance(record, dict) and record.keys() == expected,
            f"{source}: generation protocol",
            record,
            f"{_BY_NOBODY!r}, or an object of {', '.join(sorted(expected))}",
            "Make the descriptions again, or leave the line out: the protocol is then unknown.",
        )
        sections = {name: value for name, value in record.items() if name != _HASH}
        protocol = cls(**sections)
        require(
            protocol.hash == record[_HASH],
            f"{source}: hash of the generation protocol",
            record[_HASH],
            f"{protocol.hash}, that of its sections",
            "The file was edited; make the descriptions again.",
        )
        return protocol


NOT_GENERATED = GenerationProtocol(prompt={}, decoding={}, limits={}, engine={}, weights={})
"""Of labels and fixed sentences."""


def generation_protocol(
    base: BaseConfig,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    weights: Mapping[str, str],
    samples: int = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    layer: int | None = None,
) -> GenerationProtocol:
    """The protocol of what a verbalizer on this base generates. `weights`: digests by name.

    `layer`: of the activations, None: the base's.
    """
    layer = base.layer if layer is None else layer
    prompt = injection_prompt(tokenizer, base, layer=layer)
    return GenerationProtocol(
        prompt={
            "ids": config_hash(prompt.marked_ids),
            "layer": layer,
            "injection_norm": base.norm_of(layer),
            **_other_vectors(base),
        },
        decoding={"temperature": temperature, "samples": samples, "seed": seed},
        limits={"max_new_tokens": max_new_tokens},
        engine={"name": engine_name(load_model_config(base), base.engine), "dtype": base.dtype},
        weights=dict(weights),
    )


def checkpoint_protocol(
    base: BaseConfig,
    facts: ReferenceFacts,
    prompt: InjectionPrompt,
    *,
    max_new_tokens: int,
    weights: Mapping[str, str],
) -> GenerationProtocol:
    """The greedy protocol of a verbalizer that is trained whole and asked by its own prompt.

    `base`: of the report, whose type and engine it is run with. `weights`: digests by name.
    """
    config = load_model_config(facts.base_config())
    return GenerationProtocol(
        prompt={
            "ids": config_hash(prompt.marked_ids),
            "layer": facts.layer,
            "injection_norm": facts.injection_norm,
            _OWN: True,
        },
        decoding={"temperature": 0.0, "samples": 1, "seed": None},
        limits={"max_new_tokens": max_new_tokens},
        engine={"name": engine_name(config, base.engine), "dtype": base.dtype},
        weights=dict(weights),
    )


def _other_vectors(base: BaseConfig) -> dict[str, list[str]]:
    """What is injected, where it is not the activation alone; protocols knew of nothing else."""
    return {} if is_activation_alone(base.views) else {"injected": list(base.injected)}


def require_same_protocol(
    names: tuple[str, str], first: GenerationProtocol, second: GenerationProtocol
) -> None:
    """Raise ValueError, saying what differs, when two verbalizers may not be compared."""
    if not (first.is_generated and second.is_generated):
        return
    asked = first.comparison, second.comparison
    if any(_OWN in sections["prompt"] for sections in asked):
        for sections in asked:
            sections["prompt"] = {"layer": sections["prompt"]["layer"]}
    changes = config_differences(*asked)
    if changes:
        raise ValueError(
            f"comparison of {names[0]} ({first.comparison_hash}) with {names[1]}"
            f" ({second.comparison_hash}): got descriptions of two generation protocols"
            f" ({'; '.join(changes)}), expected that their weights alone differ. Describe the"
            f" activations again with the settings of {names[1]}, as --compare does with an"
            " adapter, or leave one of them out."
        )
