"""Who enters this room: models on a CPU, and processes that book no GPU."""

from __future__ import annotations

import torch


def is_for(device: torch.device) -> bool:
    """Whether a model on `device` runs what this room holds."""
    return device.type == "cpu"
