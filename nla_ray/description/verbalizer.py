"""The verbalizer: activation -> description. The base, an adapter, and the generation engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nla_ray.base.adapter_files import read_adapter
from nla_ray.base.encoding import written_text
from nla_ray.base.families import wrapper_of
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer
from nla_ray.base.prompts import injection_prompt, parse_description
from nla_ray.description.engines.interface import GenerationEngine, make_engine
from nla_ray.description.engines.requests import never
from nla_ray.description.protocol import GenerationProtocol
from nla_ray.description.record import Description
from nla_ray.score.claim_confidence import claim_log_probs
from nla_ray.settings.config import BaseConfig


class Verbalizer:
    """Describes activations with one adapter."""

    def __init__(self, engine: GenerationEngine, tokenizer: Any) -> None:
        self.engine, self._tokenizer = engine, tokenizer

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
        return cls(engine, tokenizer)

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
        is_cancelled: Callable[[], bool] = never,
    ) -> list[Description]:
        """`group_size` descriptions of each of n activations, by (activation, sample).

        `activations` [n, d_model], or [n, vectors, d_model] where several vectors stand for one.
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
            is_cancelled=is_cancelled,
        )
        return [self.with_claim_log_probs(new) for new in written] if with_claims else written

    def describe_under(
        self,
        protocol: GenerationProtocol,
        activations: Tensor,
        start: int = 0,
        *,
        with_claims: bool = False,
    ) -> list[Description]:
        """What a protocol asks for of activations, as `describe` takes them.

        `start`: the number of the first of them among all that are described: it seeds samples.
        `with_claims`: as in `describe`.
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
        )

    def with_claim_log_probs(self, new: Description) -> Description:
        """A description that its engine has sampled, with the log-probability of each claim."""
        log_probs = claim_log_probs(new.token_ids, new.log_probs, self._text_of)
        rounded = {claim: round(log_prob, 4) for claim, log_prob in log_probs.items()}
        return dataclasses.replace(new, claim_log_probs=rounded)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """What ids say, without tags."""
        return parse_description(written_text(self._tokenizer, token_ids))[0]
