"""Verbalizer and scorer as whole models in the layout of the reference implementation.

The verbalizer is the base with its adapter merged. Its tokenizer's chat template opens the
description, so that whoever renders the user's turn asks as it was trained. The manifest says by
which tags its descriptions end; they are not the reference's.

A reconstructor of this package norms the stream that its head reads, and adds a mean:
r = mu + W n(h), n(h) = h sqrt(d) / |h|. A head of the layout is linear. Directions alone are
compared, and r |h| / sqrt(d) has the direction of r, so that a linear head W + mu u^T reads the
same where u h is |h| / sqrt(d); u is fitted to the run's labels. How near it comes is measured on
other labels and stands in the manifest. The exact head lies beside, and is what this package reads.

Protects the rule that an exported model is asked in the words that it was trained with, or is not
written.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from nla_ray.activation.vectors import cosine, norm, rescale
from nla_ray.base import prompts
from nla_ray.base.adapters import merged_adapter
from nla_ray.base.identity import BaseInfo
from nla_ray.base.load import first_token, load_backbone, load_tokenizer
from nla_ray.base.reference import (
    VALUE_HEAD_NAME,
    ReferenceFacts,
    ReferenceRole,
    package_templates,
    read_reference,
)
from nla_ray.score.reconstructor import ADAPTER_NAME, HEAD_NAME, read_head
from nla_ray.score.reference import OWN_HEAD, ReferenceReconstructor
from nla_ray.settings.config import BaseConfig, require

WeightType = Literal["float32", "bfloat16"]
_RIDGE = 1e-6
"""Of the mean eigenvalue: keeps u small where labels do not tell."""


def export_verbalizer(
    base: BaseConfig, info: BaseInfo, adapter: Path, folder: Path, dtype: WeightType
) -> ReferenceFacts:
    """Write the base with an adapter merged, its tokenizer and its manifest.

    Raises ValueError for a base whose prompt takes several vectors or tells the layer, and for a
    chat template that cannot be made to open a description.
    """
    require(
        base.injected == ("activation",),
        "base.injected",
        base.injected,
        "the activation alone",
        "The layout has one vector in a prompt.",
    )
    require(
        not base.further_layers,
        "base.further_layers",
        base.further_layers,
        "none",
        "The prompt of a verbalizer of several layers tells the layer; export to peft.",
    )
    tokenizer = load_tokenizer(base)
    prompt = prompts.injection_prompt(tokenizer, base)
    model = merged_adapter(load_backbone(base).float(), adapter)
    tokenizer.chat_template = prompts.opened_template(tokenizer.chat_template)
    _save(model, tokenizer, folder, dtype)
    tags = [prompts.OPENING_TAG, prompts.CLOSING_TAG]
    facts = dataclasses.replace(
        _facts(folder, "verbalizer", base, info, dtype, {"tags": tags}),
        injection_norm=base.injection_norm,
        neighbours=prompt.neighbours,
    )
    facts.save()
    found, _ = read_reference(folder, "verbalizer").prompt(load_tokenizer(facts.base_config("cpu")))
    require(
        found == prompt,
        f"prompt of {folder}",
        found.marked_ids,
        f"{prompt.marked_ids}, as the verbalizer was trained",
        "The base's chat template ends otherwise than in its generation prompt; export to peft.",
    )
    return facts


def export_reconstructor(
    base: BaseConfig,
    info: BaseInfo,
    scorer: Path,
    folder: Path,
    dtype: WeightType,
    *,
    fitted: Sequence[str],
    checked: Sequence[str],
) -> ReferenceFacts:
    """Write blocks 0..K with a scorer's adapter merged, both heads, tokenizer and manifest.

    `fitted`: descriptions that the linear head is fitted to; `checked`: others, on which the
    manifest says how near it comes.
    """
    weight, mean, _, max_tokens = read_head(scorer / HEAD_NAME)
    tokenizer = _without_unused_beginning(load_tokenizer(base))
    first = load_backbone(base, num_blocks=base.layer + 1).float()
    model = merged_adapter(first, scorer / ADAPTER_NAME)
    _save(model, tokenizer, folder, dtype)
    shutil.copy(scorer / HEAD_NAME, folder / HEAD_NAME)
    facts = dataclasses.replace(
        _facts(folder, "reconstructor", base, info, dtype, {OWN_HEAD: HEAD_NAME}),
        target_norm=info.d_model**0.5,
        suffix_ids=(info.marker_id,),
    )
    identity = {"weight": torch.eye(info.d_model)}
    plain, rounded = dataclasses.replace(facts, own={}), model.float()  # as it is saved
    reader = ReferenceReconstructor(
        plain, rounded, tokenizer, identity, mean, max_tokens=max_tokens
    )
    streams = [
        reader.reconstruct([prompts.unmarked(text, base.marker) for text in texts])
        for texts in (fitted, checked)
    ]
    head = linear_head(weight, mean, streams[0])
    save_file({"weight": head}, folder / VALUE_HEAD_NAME)
    exact = mean + rescale(streams[1], facts.d_model**0.5) @ weight.T
    nearness = cosine(streams[1] @ head.T, exact)
    measured = {
        "descriptions": len(checked),
        "mean_cosine": round(nearness.mean().item(), 6),
        "lowest_cosine": round(nearness.min().item(), 6),
    }
    facts = dataclasses.replace(facts, own={**facts.own, "value_head": measured})
    facts.save()
    return facts


def linear_head(weight: Tensor, mean: Tensor, streams: Tensor) -> Tensor:
    """W + mu u^T, with u h nearest |h| / sqrt(d) over streams h: [d, d] float32.

    `streams` [n, d], the stream at the end of n prompts. Ridge regression in float64.
    """
    d_model = streams.shape[1]
    rows, target = streams.double(), norm(streams).double() / d_model**0.5
    gram = rows.T @ rows
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(d_model, dtype=torch.float64)
    u = torch.linalg.solve(gram, rows.T @ target)[:, 0]
    return weight + torch.outer(mean, u.float())


def _facts(
    folder: Path,
    role: ReferenceRole,
    base: BaseConfig,
    info: BaseInfo,
    dtype: WeightType,
    own: dict[str, Any],
) -> ReferenceFacts:
    """What facts of both roles say alike."""
    return ReferenceFacts(
        folder=folder,
        role=role,
        layer=base.layer,
        d_model=info.d_model,
        num_blocks=info.num_layers if role == "verbalizer" else base.layer + 1,
        model_type=info.model_type,
        dtype=dtype,
        template=package_templates(base.marker)[role],
        marker=base.marker,
        marker_id=info.marker_id,
        base_name=base.model,
        own={"base_digest": info.digest, **own},
    )


def _save(model: Any, tokenizer: Any, folder: Path, dtype: WeightType) -> None:
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _without_unused_beginning(tokenizer: Any) -> Any:
    """A tokenizer that names no first token unless it puts one there: readers ask for it."""
    if not first_token(tokenizer):
        tokenizer.bos_token = None
    return tokenizer
