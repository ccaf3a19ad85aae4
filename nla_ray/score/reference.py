"""A reconstructor in the layout of the reference implementation: a cut model and a linear head.

r = W h (+ b): h is the residual stream after the last of its blocks, at the last token of its
template, with no final norm. The template is filled with the description alone, without a chat
template, and tokenised with the tokens that the tokenizer itself puts around a text: without the
first of them it reads something else.

One that this package has exported reads as it did before: its head file lies beside, see `OWN_KEY`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.base.encoding import encode_texts
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import unmarked
from nla_ray.base.reference import VALUE_HEAD_NAME, ReferenceFacts, read_reference
from nla_ray.score.reconstructor import HEAD_NAME, DescriptionReader, read_head
from nla_ray.settings.config import require

OWN_HEAD = "head"
"""In a manifest under `OWN_KEY`: the head file of this package that lies beside."""
_MOST_TOKENS = 512
"""Longest description that is read whole."""
_PREFIX = "value_head."
"""Some tools write it before the names in the head's file."""


class ReferenceReconstructor(DescriptionReader):
    """Reads descriptions with a model that is trained whole, in its own template."""

    def __init__(
        self,
        facts: ReferenceFacts,
        model: Any,
        tokenizer: Any,
        weights: dict[str, Tensor],
        mean: Tensor,
        *,
        max_tokens: int = _MOST_TOKENS,
    ) -> None:
        """`weights`: `weight` [d_model, d_model] and, where the head has one, `bias` [d_model]."""
        super().__init__(
            model,
            tokenizer,
            adapter=None,
            layer=facts.num_blocks - 1,
            mean=mean,
            max_tokens=max_tokens,
            has_bias="bias" in weights,
        )
        self.facts = facts
        self.head.load_state_dict(weights)

    @property
    def _is_own(self) -> bool:
        """Whether this package exported it, with the head that it has read with before."""
        return OWN_HEAD in self.facts.own

    def encode(self, descriptions: Sequence[str]) -> list[list[int]]:
        """The prompts as ids, with the tokens that the tokenizer puts around a text.

        A description of more than `max_tokens` tokens is cut at its end.
        """
        texts = [self._cut(text).strip() for text in descriptions]
        if self._is_own:
            texts = [unmarked(text, self.facts.marker) for text in texts]
        before, after = self.facts.around()
        return encode_texts(
            self.tokenizer, texts, before=before, after=after, add_special_tokens=True
        )

    def _reconstruct(
        self, last_stream: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch d_model"]:
        """The stream at the prompts' ends -> reconstructions."""
        with torch.autocast(last_stream.device.type, enabled=False):
            if self._is_own:
                scaled = vectors.rescale(last_stream, self.mean.shape[0] ** 0.5)
                return self.mean + self.head(scaled)
            return self.head(last_stream.float())

    def errors(self, descriptions: Sequence[str], activations: Tensor) -> Tensor:
        """The error that it was trained by, of each description with its row: [n] float32.

        `activations` [n, d_model]. Both vectors have the norm `mse_scale` of its manifest.
        """
        read = self.reconstruct(descriptions)
        return vectors.mean_squared_error(read, activations, self.facts.target_norm)


def load_reconstructor(
    path_or_id: str | Path,
    *,
    mean: Tensor | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> ReferenceReconstructor:
    """A reconstructor from a local folder with `nla_meta.yaml`, or from a hub id.

    `mean`: direction [d_model] that centred scores are computed with, of whatever is scored; None:
    that of its folder, where this package has exported it, else zero, with which a centred score is
    the plain cosine. `dtype`: of its blocks; None: as they are saved. The head is float32. Raises
    ValueError for what `read_reference` refuses, for a head of another shape or with non-finite
    rows, for weights that are missing, and for a tokenizer without the beginning it was trained
    with.
    """
    facts = read_reference(path_or_id, "reconstructor")
    facts = dataclasses.replace(facts, dtype=dtype or facts.dtype)
    base = facts.base_config(device)
    weights, recorded_mean, max_tokens = _head(facts)
    tokenizer = load_tokenizer(base)
    loaded = ReferenceReconstructor(
        facts,
        load_backbone(base, num_blocks=facts.num_blocks),
        tokenizer,
        weights,
        recorded_mean if mean is None else mean,
        max_tokens=max_tokens,
    )
    _check_prompt(loaded)
    return loaded.eval().requires_grad_(False)


def _head(facts: ReferenceFacts) -> tuple[dict[str, Tensor], Tensor, int]:
    """The head's tensors, the mean direction, and the most tokens of a description."""
    if OWN_HEAD in facts.own:
        weight, mean, _, max_tokens = read_head(facts.folder / HEAD_NAME)
        return {"weight": weight}, mean, max_tokens
    file, d_model = facts.folder / VALUE_HEAD_NAME, facts.d_model
    require(
        file.is_file(),
        f"reconstructor {str(facts.folder)!r}",
        f"no {VALUE_HEAD_NAME}",
        "the head beside the model",
        "It cannot be had from the model; get the file from where the model is from.",
    )
    weights = {name.removeprefix(_PREFIX): value.float() for name, value in load_file(file).items()}
    shapes = {name: list(value.shape) for name, value in sorted(weights.items())}
    expected = {"bias": [d_model], "weight": [d_model, d_model]}
    require(
        shapes in (expected, {"weight": expected["weight"]}),
        f"{file}: tensors",
        shapes,
        f"weight {expected['weight']}, with or without bias {expected['bias']}",
        "The head is of another model.",
    )
    for name, value in weights.items():
        _require_finite(value.reshape(d_model, -1), f"{file}: {name}")
    return weights, torch.zeros(d_model), _MOST_TOKENS


def _require_finite(rows: Tensor, what: str) -> None:
    bad = (~rows.isfinite().all(-1)).nonzero().flatten().tolist()
    require(
        not bad,
        what,
        f"non-finite values in {len(bad)} of {len(rows)} rows ({', '.join(map(str, bad[:8]))})",
        "finite ones",
        "It was saved from a training in shards, or has diverged; ask for another file.",
    )


def _check_prompt(loaded: ReferenceReconstructor) -> None:
    """Raise ValueError unless the tokenizer begins and ends a prompt as it did in training."""
    facts, tokenizer = loaded.facts, loaded.tokenizer
    [ids] = loaded.encode(["a"])
    first, expected = tokenizer.bos_token_id, facts.suffix_ids
    require(
        first is None or ids[0] == first,
        f"tokenizer of {facts.folder}: first id of a prompt",
        ids[0],
        f"{first}, the token that begins a text",
        "Without it every reconstruction is another one; load the tokenizer of the training.",
    )
    require(
        tuple(ids[len(ids) - len(expected) :]) == expected,
        f"tokenizer of {facts.folder}: last ids of a prompt",
        ids[len(ids) - len(expected) :],
        f"{list(expected)}, as the manifest records",
        "The tokenizer or template differs from the one it was trained with; load that one.",
    )
