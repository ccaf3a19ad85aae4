"""What the slots of the generation engine ask of a decoder: a base's blocks under one adapter.

A new way to run blocks is a class with these members, chosen in `interface.make_engine`; then it
keeps the promises of tests/description/test_engine.py.

Dimension words: rows (sequences), seq, d_model, groups (key-value heads), head_dim, prefix (tokens
common to all rows), tail (a row's own tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nla_ray.base.families import DecoderShape


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of the same tokens in every block.

    Each is [layers, rows, groups, seq, head_dim].
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls, shape: DecoderShape, rows: int, seq: int, *, dtype: torch.dtype, device: torch.device
    ) -> KeysValues:
        """Room for `seq` tokens of each row: zeros, since what is out of sight must be finite."""
        size = (shape.layers, rows, shape.groups, seq, shape.head_dim)
        return cls(*(torch.zeros(size, dtype=dtype, device=device) for _ in range(2)))


class Decoder(Protocol):
    """Runs the blocks of one base under one set of adapter weights."""

    shape: DecoderShape
    d_model: int
    dtype: torch.dtype
    device: torch.device
    can_be_recorded: bool
    """Whether a step may be replayed from a CUDA graph."""

    def load(self, state: Mapping[str, Tensor] | None, scaling: float) -> bool:
        """Use this adapter from now on; None: the plain base.

        `state`: tensors as `adapters.adapter_state` names them. `scaling` = alpha / rank. Says
        whether the weights lie where they lay before, as a recorded step needs it. Raises
        ValueError for tensors that belong to no matrix of this base.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """[...] ids below vocab_size -> [..., d_model]."""
        ...

    def logits(self, stream: Tensor) -> Tensor:
        """What `prefill` and `step` return [rows, d_model] -> [rows, vocab]."""
        ...

    def places(self, length: int) -> Tensor:
        """What `step` is told of every position below `length`, [length, ...]."""
        ...

    def prefill(self, embedded: Tensor, prefix: KeysValues) -> tuple[Tensor, KeysValues]:
        """Run [rows, seq, d_model] after a common prefix of one row.

        Returns the stream at the last token [rows, d_model], and the new tokens' keys and values.
        """
        ...

    def step(
        self,
        embedded: Tensor,
        places: Tensor,
        tail: KeysValues,
        column: int | Tensor,
        hidden: Tensor,
        prefix: KeysValues,
    ) -> Tensor:
        """One token per row: [rows, d_model] -> the stream after the last block.

        `places` [rows, ...]: of each row's token. The new keys and values are written to `column`
        of the tail, a number or [1] int64. `hidden` [rows * groups, 1, columns] is 0 where a row
        may look and -inf elsewhere.
        """
        ...


def empty_prefix(decoder: Decoder) -> KeysValues:
    """The prefix of no tokens."""
    return KeysValues.empty(decoder.shape, 1, 0, dtype=decoder.dtype, device=decoder.device)
