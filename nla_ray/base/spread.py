"""The first blocks of a base over several GPUs of a process, where one GPU does not hold them.

Knows where a model's parts are; knows nothing of files. Protects the rule that what is read does
not depend on where blocks are: numbers are moved, and computed by the same modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from nla_ray.base.families import blocks_of, decoder_of, family_of


def spread_blocks(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Put as many blocks on each device, in their order, and all else on the first one.

    `model`: a causal model of the first blocks alone, without final norm and head. The stream of a
    block is on that block's device.
    """
    decoder, blocks = decoder_of(model), blocks_of(model)
    path = family_of(model).blocks
    decoder.set_submodule(path, nn.ModuleList(), strict=True)
    model.to(devices[0])
    decoder.set_submodule(path, blocks, strict=True)
    for number, block in enumerate(blocks):
        device = devices[number * len(devices) // len(blocks)]
        block.to(device)
        block.register_forward_pre_hook(partial(_send_inputs, device), with_kwargs=True)


def _send_inputs(device: torch.device, block: nn.Module, inputs: Any, options: Any) -> Any:
    """A block's hook: its stream, mask and positions come from wherever they are."""
    return send_to_device(inputs, device), send_to_device(options, device)
