"""A verbalizer in the layout of the reference implementation: a whole model with its own prompt.

It is a `Verbalizer` as any other: its engine injects as everyone's does, TO the norm and at the
marker that its manifest says. Only the tags in what it writes are its own. Gemma's embedding scales
the tokens around the marker; what is injected is not scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nla_ray.base.encoding import written_text
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import InjectionPrompt
from nla_ray.base.reference import ReferenceFacts, parse_explanation, read_reference
from nla_ray.description.engines.interface import EngineChoice, GenerationEngine, make_engine
from nla_ray.description.record import Description
from nla_ray.description.verbalizer import Verbalizer


class ReferenceVerbalizer(Verbalizer):
    """Describes activations with a model that is trained whole, in its own words."""

    def __init__(
        self,
        facts: ReferenceFacts,
        engine: GenerationEngine,
        tokenizer: Any,
        prompt: InjectionPrompt,
        *,
        is_open: bool,
    ) -> None:
        """`is_open`: the prompt ends in the opening tag."""
        super().__init__(engine, tokenizer)
        self.facts, self.prompt, self._is_open = facts, prompt, is_open

    def _read(self, new: Description) -> Description:
        """Between its own tags; a closing tag that never came is told by `closed`."""
        text, closed = self._parse(new.written or "", finished=new.finished)
        return dataclasses.replace(new, text=text, closed=closed)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        return self._parse(written_text(self._tokenizer, token_ids), finished=True)[0]

    def _parse(self, written: str, *, finished: bool) -> tuple[str, bool]:
        tags = self.facts.tags
        return parse_explanation(written, tags, is_open=self._is_open, finished=finished)


def load_verbalizer(
    path_or_id: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16"] | None = None,
    engine: EngineChoice = "auto",
    max_slots: int = 64,
) -> ReferenceVerbalizer:
    """A verbalizer from a local folder with `nla_meta.yaml`, or from a hub id.

    `dtype`: of its weights; None: as they are saved. `engine`, `max_slots`: as `make_engine` takes
    them. Raises ValueError for what `read_reference` refuses, for another marker or neighbours
    than recorded, and for weights that are missing.

    Example::

        [said] = load_verbalizer("ORG/NAME").describe(activations, max_new_tokens=150)
        said.text, said.closed
    """
    facts = read_reference(path_or_id, "verbalizer")
    facts = dataclasses.replace(facts, dtype=dtype or facts.dtype)
    base = facts.base_config(device)
    tokenizer = load_tokenizer(base)
    prompt, is_open = facts.prompt(tokenizer)
    made = make_engine(
        load_backbone(base), tokenizer, prompt, base.injection_norm, max_slots, chosen=engine
    )
    return ReferenceVerbalizer(facts, made, tokenizer, prompt, is_open=is_open)
