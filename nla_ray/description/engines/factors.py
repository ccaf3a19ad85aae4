"""The tensors of a LoRA adapter, handed out to the matrices that they change.

Protects the rule that every tensor of an adapter finds its place, or the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIX = "base_model.model."
"""Of every tensor: peft's wrapper around the causal model."""


class Factors:
    """An adapter's tensors while matrices take theirs."""

    def __init__(self, state: Mapping[str, Tensor], scaling: float) -> None:
        """`state`: as `adapters.adapter_state` names it. `scaling` = alpha / rank."""
        self._remaining, self.scaling = dict(state), scaling

    def take(self, shape: torch.Size, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a matrix [out, in], float32; of rank 0 without any.

        `name`: the matrix's in the causal model. Raises ValueError for factors of another matrix,
        and for half a pair.
        """
        down = self._remaining.pop(f"{_PREFIX}{name}.lora_A.weight", None)
        up = self._remaining.pop(f"{_PREFIX}{name}.lora_B.weight", None)
        out, inner = shape
        if down is None and up is None:
            return torch.empty(0, inner, device=device), torch.empty(out, 0, device=device)
        if down is None or up is None:
            raise ValueError(
                f"adapter weights {name}: got one of two factors, expected both factors,"
                " lora_A and lora_B. Publish or save the whole adapter again."
            )
        if up.shape[0] != out or down.shape[1] != inner or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"adapter weights {name}: got factors {tuple(up.shape)} and {tuple(down.shape)} for"
                f" a weight of {(out, inner)}, expected [out, rank] and [rank, in]. They are of"
                " another base."
            )
        return down.to(device).float(), up.to(device).float()

    def merge(self, weight: Tensor, name: str) -> Tensor:
        """weight [out, in] + scaling * B A, in float32."""
        down, up = self.take(weight.shape, weight.device, name)
        weight = weight.float()
        return torch.addmm(weight, up, down, alpha=self.scaling) if len(down) else weight

    def require_empty(self, example: str, layers: int) -> None:
        """Raise ValueError when a tensor is left. `example`: the name of a matrix."""
        if self._remaining:
            raise ValueError(
                f"adapter weights: got {len(self._remaining)} tensors without a place, first"
                f" {min(self._remaining)!r}, expected LoRA factors such as"
                f" '{_PREFIX}{example}.lora_A.weight' in {layers} blocks. They are of another base."
            )
