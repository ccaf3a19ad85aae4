"""In which type a trainer multiplies matrices, and with which attention."""

from __future__ import annotations

import torch
from torch import nn

from nla_ray.base.load import computes_in_bf16
from nla_ray.cpu.attention import register_grouped
from nla_ray.settings.config import BaseConfig


def training_attention(base: BaseConfig) -> str | None:
    """The attention to train with, as `load_backbone` takes it.

    PyTorch's fused attention has no fast backward pass in bfloat16 on CPU: four times as long as
    plain products (16 rows of 92 tokens on 129, 9 heads of 64 on 3: 29 ms against 7).
    """
    on_gpu = base.device != "cpu" and torch.cuda.is_available()
    return register_grouped() if computes_in_bf16(base) and not on_gpu else None


def autocast_forward(model: nn.Module, base: BaseConfig) -> nn.Module:
    """Let `model.forward` compute matrix products in bfloat16 where that is fast; weights and
    gradients stay as they are.

    Inside the forward, because DeepSpeed turns an autocast around it off; and not by the trainer's
    `bf16`, with which DeepSpeed would hold the adapter itself in bfloat16.
    """
    if computes_in_bf16(base):
        device = next(model.parameters()).device.type
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model
