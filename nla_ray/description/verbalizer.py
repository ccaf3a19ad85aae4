"""The verbalizer: activation -> description. The base, an adapter, and the generation engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nla_ray.base.adapter_files import read_adapter
from nla_ray.base.encoding import written_text
from nla_ray.base.families import wrapper_of
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer
from nla_ray.base.prompts import LayerEnding, injection_prompt, layer_endings, parse_description
from nla_ray.description.engines.interface import GenerationEngine, make_engine
from nla_ray.description.engines.requests import never
from nla_ray.description.protocol import GenerationProtocol
from nla_ray.description.record import Description
from nla_ray.score.claim_confidence import claim_log_probs
from nla_ray.settings.config import BaseConfig, require


class Verbalizer:
    """Describes activations with one adapter."""

    def __init__(
        self,
        engine: GenerationEngine,
        tokenizer: Any,
        endings: Mapping[int, LayerEnding | None] | None = None,
    ) -> None:
        """`endings`: how the prompt of each layer ends that it describes; None: as the engine's.

        Without them it knows the layer alone that the engine was made for, by no number.
        """
        self.engine, self._tokenizer, self._endings = engine, tokenizer, dict(endings or {})

    @classmethod
    def load(
        cls,
        base: BaseConfig,
        folder: Path | str | None,
        *,
        neighbours: Sequence[int] | None = None,
        max_slots: int = 64,
        model=None,
    ) -> Verbalizer:
        """A saved adapter (None: the plain base) on its base.

        `neighbours`: the marker's neighbours that the adapter's manifest records; other ones raise
        ValueError. `model`: a loaded base to share, with or without adapters in it.
        """
        tokenizer = load_tokenizer(base)
        prompt = injection_prompt(tokenizer, base, neighbours)
        state, lora = None, None
        if folder is not None:
            is_wrapped = wrapper_of(load_model_config(base)) is not None
            state, lora = read_adapter(folder, is_wrapped=is_wrapped)
        engine = make_engine(
            load_backbone(base) if model is None else model,
            tokenizer,
            prompt,
            base.injection_norm,
            max_slots,
            lora,
            chosen=base.engine,
        )
        if state is not None:
            engine.load_weights(state, 0)
        return cls(engine, tokenizer, {base.layer: None, **layer_endings(tokenizer, base)})

    def describe(
        self,
        activations: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        group_size: int = 1,
        with_claims: bool = False,
        layer: int | None = None,
        is_cancelled: Callable[[], bool] = never,
    ) -> list[Description]:
        """`group_size` descriptions of each of n activations, by (activation, sample).

        `activations` [n, d_model], or [n, vectors, d_model] where several vectors stand for one.
        `layer`: which they are of, None: the base's; ValueError for one that was not learned.
        `rows` seed the samples, as in the engine. A sample does not depend on how many are drawn.
        `with_claims`: the log-probability of each claim is kept, to four digits: its last bits
        depend on the batch. `is_cancelled`: as the engine takes it.
        """
        written = self.engine.generate(
            activations,
            group_size=group_size,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            rows=rows,
            ending=self.ending_of(layer),
            is_cancelled=is_cancelled,
        )
        read = [self._read(new) for new in written]
        return [self.with_claim_log_probs(new) for new in read] if with_claims else read

    def describe_under(
        self,
        protocol: GenerationProtocol,
        activations: Tensor,
        start: int = 0,
        *,
        with_claims: bool = False,
        layer: int | None = None,
    ) -> list[Description]:
        """What a protocol asks for of activations, as `describe` takes them.

        `start`: the number of the first of them among all that are described: it seeds samples.
        `with_claims`, `layer`: as in `describe`.
        """
        decoding = protocol.decoding
        return self.describe(
            activations,
            max_new_tokens=protocol.limits["max_new_tokens"],
            temperature=decoding["temperature"],
            seed=decoding["seed"] or 0,
            rows=range(start, start + len(activations)),
            group_size=decoding["samples"],
            with_claims=with_claims,
            layer=layer,
        )

    def ending_of(self, layer: int | None) -> LayerEnding | None:
        """How the prompt of a layer ends; None: as the engine's, and so for None.

        Raises ValueError for a layer that was not learned.
        """
        if layer is None:
            return None
        require(
            layer in self._endings,
            "layer",
            layer,
            f"one that the verbalizer has learned to describe: {sorted(self._endings)}",
            "Train it on further ones: --base.further-layers.",
        )
        return self._endings[layer]

    def _read(self, new: Description) -> Description:
        """What an engine wrote; engines know this package's tags and no other."""
        return new

    def with_claim_log_probs(self, new: Description) -> Description:
        """A description that its engine has sampled, with the log-probability of each claim."""
        log_probs = claim_log_probs(new.token_ids, new.log_probs, self._text_of)
        rounded = {claim: round(log_prob, 4) for claim, log_prob in log_probs.items()}
        return dataclasses.replace(new, claim_log_probs=rounded)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """What ids say, without tags."""
        return parse_description(written_text(self._tokenizer, token_ids))[0]
