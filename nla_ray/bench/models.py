"""Facts and adapters that the sides share: parameters that multiply a token, a random adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nla_ray.base.adapters import adapter_state, add_lora, save_adapter, set_adapter_state
from nla_ray.base.families import family_of
from nla_ray.base.load import load_backbone
from nla_ray.settings.config import RunConfig

_RANDOM_SCALE = 0.02


def read_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token that is read.

    Matrices of the blocks and of an output head, not the embedding table.
    """
    embedding = family_of(model).embedding
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and embedding not in name and ".lora_" not in name
    )


def predicting_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token that is predicted.

    A tied output matrix is the embedding table once more.
    """
    tied = model.get_input_embeddings().weight.numel() if model.config.tie_word_embeddings else 0
    return read_parameters(model) + tied


def with_random_adapter(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model with an adapter of the configured rank that changes what it says."""
    model = add_lora(model, config.sft.lora, trainable=False)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * _RANDOM_SCALE
        for name, value in adapter_state(model).items()
    }
    set_adapter_state(model, state)
    return model


def save_random_adapter(config: RunConfig, folder: Path) -> str:
    """A folder with a random adapter of the base; returns its path."""
    save_adapter(with_random_adapter(load_backbone(config.base), config), folder)
    return str(folder)
