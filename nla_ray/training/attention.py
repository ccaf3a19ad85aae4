"""With which attention a trainer computes."""

from __future__ import annotations

from nla_ray.base.load import computes_in_bf16, load_model_config, torch_device
from nla_ray.cpu import door
from nla_ray.cpu.attention import register_grouped
from nla_ray.settings.config import BaseConfig


def training_attention(base: BaseConfig) -> str | None:
    """The attention to train with, as `load_backbone` takes it.

    None: the library's own choice, as for a base that caps attention's weights, which the one below
    does not. PyTorch's fused attention has no fast backward pass in bfloat16 on CPU: four times as
    long as plain products (16 rows of 92 tokens on 129, 9 heads of 64 on 3: 29 ms against 7).
    """
    if not (door.is_for_device(torch_device(base)) and computes_in_bf16(base)):
        return None
    if getattr(load_model_config(base), "attn_logit_softcapping", None) is not None:
        return None
    return register_grouped()
