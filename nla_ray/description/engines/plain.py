"""A decoder for every base in the table of families: it runs the library's own modules.

Slower than `compact`, and right wherever transformers is: whatever norms, positions, windows,
experts or caps a family has are computed by its own code. Only where keys and values lie, which of
them a row sees, and the adapter's factors are decided here. Knows nothing of sampling or
scheduling.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from nla_ray.base.adapters import matrix_shape, plain_linear
from nla_ray.base.families import causal_model, decoder_of, decoder_shape, family_of
from nla_ray.base.layers import cap_logits
from nla_ray.description.engines.decoder import KeysValues
from nla_ray.description.engines.factors import Factors
from nla_ray.description.engines.projection import Float32Head, make_projection


class PlainDecoder:
    """Runs a copy of a base's modules, which shares every weight with it, under an adapter."""

    can_be_recorded = False

    def __init__(self, model: nn.Module, *, rows: int) -> None:
        """`rows`: how many sequences a step usually has; the head is packed for that."""
        causal = causal_model(model)
        self._family, self.shape = family_of(causal), decoder_shape(causal.config)
        self._embedding = decoder_of(model).get_submodule(self._family.embedding)
        self._decoder = _sharing_copy(decoder_of(model), self._embedding)
        inside = f"{self._family.decoder}."
        self._matrices = {
            name: _adapt(self._decoder, name.removeprefix(inside))
            for name in self._family.matrices(self.shape.layers)
        }
        weight = causal.get_submodule(self._family.head).weight.detach()
        self.dtype, self.device, self.d_model = weight.dtype, weight.device, weight.shape[1]
        is_exact = self.dtype == torch.float32
        self._head = (make_projection if is_exact else Float32Head)(weight, rows=rows)
        self._config = causal.config

    def load(self, state: Mapping[str, Tensor] | None, scaling: float) -> bool:
        """Use this adapter from now on, as `Decoder` says."""
        factors = Factors(state or {}, scaling)
        taken = {
            name: factors.take(matrix.shape, matrix.device, name)
            for name, matrix in self._matrices.items()
        }
        factors.require_empty(next(iter(self._matrices)), self.shape.layers)
        for name, (down, up) in taken.items():
            self._matrices[name].factors = (down, scaling * up) if len(down) else None
        return False

    def embed(self, ids: Tensor) -> Tensor:
        """[...] ids below vocab_size -> [..., d_model], scaled where the family scales them."""
        return self._embedding(ids)

    def logits(self, stream: Tensor) -> Tensor:
        """Normalised stream [rows, d_model] -> [rows, vocab]."""
        return cap_logits(self._config, self._head(stream))

    def places(self, length: int) -> Tensor:
        """Position ids: [length] int64."""
        return torch.arange(length, device=self.device)

    def prefill(self, embedded: Tensor, prefix: KeysValues) -> tuple[Tensor, KeysValues]:
        """Run [rows, seq, d_model] after a common prefix, as `Decoder` says."""
        rows, seq, _ = embedded.shape
        start = prefix.keys.shape[3]
        new = KeysValues.empty(self.shape, rows, seq, dtype=self.dtype, device=self.device)
        future = torch.full((seq, seq), -torch.inf, dtype=self.dtype, device=self.device).triu(1)
        hidden = F.pad(future, (start, 0)).expand(rows, 1, -1, -1)
        positions = torch.arange(start, start + seq, device=self.device).expand(rows, -1)
        stream = self._run(embedded, positions, hidden, _Columns.cache(prefix, new, slice(None)))
        return stream[:, -1], new

    def step(
        self,
        embedded: Tensor,
        places: Tensor,
        tail: KeysValues,
        column: int | Tensor,
        hidden: Tensor,
        prefix: KeysValues,
    ) -> Tensor:
        """One token per row, as `Decoder` says."""
        rows, columns = len(embedded), tail.keys.shape[3]
        own = hidden.view(rows, self.shape.groups, 1, columns)[:, :1]
        mask = F.pad(own, (prefix.keys.shape[3], 0))
        start = int(column)
        cache = _Columns.cache(prefix, tail, slice(start, start + 1))
        return self._run(embedded.unsqueeze(1), places.unsqueeze(1), mask, cache)[:, 0]

    def _run(self, embedded: Tensor, positions: Tensor, hidden: Tensor, cache: Cache) -> Tensor:
        return self._decoder(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=hidden,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


class _Columns(DynamicLayer):
    """The library's cache of one block, whose keys and values lie in columns of ours."""

    def __init__(self, prefix: tuple[Tensor, Tensor], rows: KeysValues, layer: int, new: slice):
        super().__init__()
        self._prefix, self._new = prefix, new
        self._own = rows.keys[layer], rows.values[layer]

    @classmethod
    def cache(cls, prefix: KeysValues, rows: KeysValues, new: slice) -> Cache:
        """Of all blocks: rows see `prefix` and their own columns, of which `new` are written."""
        count = rows.keys.shape[1]
        common = [
            (keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1))
            for keys, values in zip(prefix.keys, prefix.values, strict=True)
        ]
        return Cache(
            layers=[cls(common[layer], rows, layer, new) for layer in range(len(rows.keys))]
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        """Write the new keys and values; all that the rows may see, in order of columns."""
        for own, states in zip(self._own, (key_states, value_states), strict=True):
            own[:, :, self._new] = states
        pairs = zip(self._prefix, self._own, strict=True)
        keys, values = (torch.cat(pair, dim=2) for pair in pairs)
        return keys, values

    def get_seq_length(self) -> int:
        """Only asked where no positions are given; they always are."""
        return self._prefix[0].shape[2]


class _AdaptedMatrix(nn.Module):
    """A matrix of the base with an adapter's factors beside it, computed as peft computes them."""

    def __init__(self, frozen: Any) -> None:
        super().__init__()
        self._frozen = frozen
        self.shape, self.device = matrix_shape(frozen), frozen.weight.device
        self.factors: tuple[Tensor, Tensor] | None = None
        """A [rank, in] and B times the scaling [out, rank], float32; None: the plain base."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        result = self._frozen(x)
        if self.factors is None:
            return result
        down, up = self.factors
        return (result + F.linear(F.linear(x.to(down.dtype), down), up)).to(result.dtype)


def _sharing_copy(decoder: nn.Module, embedding: nn.Module) -> nn.Module:
    """New modules around the same tensors, so that ours may be changed."""
    shared = chain(decoder.parameters(), decoder.buffers())
    return copy.deepcopy(decoder, {id(embedding): embedding, **{id(one): one for one in shared}})


def _adapt(decoder: nn.Module, path: str) -> _AdaptedMatrix:
    """Put an `_AdaptedMatrix` in the place of a matrix, with or without peft's layer around it."""
    frozen = plain_linear(decoder.get_submodule(path))
    adapted = _AdaptedMatrix(frozen)
    decoder.set_submodule(path, adapted, strict=True)
    return adapted
