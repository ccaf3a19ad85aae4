"""A compact decoder for Llama-like models, made for generation after a common prefix.

Arranges the weights of a transformers model for few, large operations: queries, keys and values in
one product, rotary pairs side by side so that a rotation is one complex product. Knows nothing of
sampling or scheduling.

A LoRA adapter is used in one of two ways. Where weights are float32 it is merged into a copy of
them, with the norms' weights and attention's scale. In a narrower type each of these would be
rounded to the weights' own steps, and a small adapter would be lost: there the weights are the
base's own, and the adapter's factors, norms and scale are applied beside them, each rounded where
the library rounds it.

Dimension words: rows (sequences), seq, d_model, heads, groups (key-value heads), share (query heads
per group), head_dim, prefix (tokens common to all rows), tail (a row's own tokens).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nla_ray.base.adapters import plain_linear
from nla_ray.base.families import (
    BlockParts,
    beyond_parts,
    blocks_of,
    causal_model,
    decoder_of,
    decoder_shape,
    family_of,
)
from nla_ray.description.engines.decoder import KeysValues
from nla_ray.description.engines.factors import Factors
from nla_ray.description.engines.projection import (
    AdaptedProjection,
    Float32Head,
    Projection,
    make_projection,
)


@dataclass(frozen=True)
class Block:
    """The projections of one decoder block, and the weights of the norms before them."""

    query_key_value: Projection
    output: Projection
    gate: Projection
    up: Projection
    down: Projection
    attention_norm: Tensor | None = None
    """[d_model]; None: inside the projection that follows."""
    mlp_norm: Tensor | None = None
    head_norms: Tensor | None = None
    """Of queries and keys, [heads + groups, head_dim] in the order of `_pair`; None: no norms."""


class CompactDecoder:
    """Runs the blocks of one model under one set of adapter weights."""

    can_be_recorded = True

    def __init__(self, model: nn.Module, *, rows: int, merged: bool | None = None) -> None:
        """`rows`: how many sequences a step usually has; the weights are packed for that.

        `merged`: whether adapters are merged into a copy of the weights; None: where those are
        float32. Raises ValueError for a base that its blocks' parts alone do not tell.
        """
        self._model, self._rows = causal_model(model), rows
        self._family = family = family_of(model)
        self._parts = _parts_of(self._model.config)
        self.shape = decoder_shape(self._model.config)
        decoder = decoder_of(model)
        embedding = decoder.get_submodule(family.embedding).weight.detach()
        self.dtype, self.device = embedding.dtype, embedding.device
        self.merged = self.dtype == torch.float32 if merged is None else merged
        self._embedding, self.d_model = embedding, embedding.shape[1]
        self._scale = self.shape.head_dim**-0.5
        head = self._model.get_submodule(family.head).weight.detach()
        final_norm = decoder.get_submodule(family.final_norm).weight.detach()
        if self.merged:
            self._head, self._final_norm = self._projection(_fold(head, final_norm)), None
        else:
            self._head, self._final_norm = Float32Head(head, rows=rows), final_norm
        rotary = decoder.get_submodule(family.rotary)
        self._frequencies, self._rotary_scale = (
            rotary.inv_freq.detach().float(),
            float(rotary.attention_scaling),
        )
        self._rotations = torch.empty(0)
        layers = range(self.shape.layers)
        self._frozen = [] if self.merged else [self._frozen_block(index) for index in layers]
        self._blocks = self._frozen

    def load(self, state: Mapping[str, Tensor] | None, scaling: float) -> bool:
        """Use this adapter from now on; None: the plain base.

        `state`: tensors as `adapters.adapter_state` names them. `scaling` = alpha / rank. Says
        whether the weights lie where they lay before, as a recorded step needs it. Raises
        ValueError for tensors that belong to no projection of this model.
        """
        factors = Factors(state or {}, scaling)
        build = self._merged_block if self.merged else self._adapted_block
        blocks = [build(index, factors) for index in range(self.shape.layers)]
        factors.require_empty(self._name(0, self._parts.query), self.shape.layers)
        stays = len(self._blocks) == len(blocks) and all(map(_can_take_over, self._blocks, blocks))
        if stays:
            for before, after in zip(self._blocks, blocks, strict=True):
                _take_over(before, after)
        else:
            self._blocks = blocks
        return stays

    def _merged_block(self, index: int, factors: Factors) -> Block:
        """Adapter, norms and attention's scale in a copy of the weights."""
        parts, block = self._parts, blocks_of(self._model)[index]

        def merged(path: str) -> Tensor:
            return factors.merge(self._weight(index, path), self._name(index, path))

        query, key, value = (merged(path) for path in (parts.query, parts.key, parts.value))
        head_norms = self._head_norms(block, self._scale)
        scale = self._scale if head_norms is None else 1.0  # a norm would take it away again
        joined = self._join(query * scale, key, value)
        before = block.get_submodule(parts.attention_norm).weight
        after = block.get_submodule(parts.mlp_norm).weight
        return Block(
            query_key_value=self._projection(
                _fold(joined, before), self._joined_bias(block, scale)
            ),
            output=self._projection(merged(parts.output)),
            gate=self._projection(_fold(merged(parts.gate), after)),
            up=self._projection(_fold(merged(parts.up), after)),
            down=self._projection(merged(parts.down)),
            head_norms=head_norms,
        )

    def _frozen_block(self, index: int) -> Block:
        """The base's own weights; those of queries, keys and values are copied together."""
        parts, block = self._parts, blocks_of(self._model)[index]

        def frozen(path: str) -> Projection:
            return self._projection(self._weight(index, path))

        joined = self._join(
            *(self._weight(index, path) for path in (parts.query, parts.key, parts.value))
        )
        return Block(
            query_key_value=self._projection(joined, self._joined_bias(block, 1.0)),
            output=frozen(parts.output),
            gate=frozen(parts.gate),
            up=frozen(parts.up),
            down=frozen(parts.down),
            attention_norm=block.get_submodule(parts.attention_norm).weight.detach(),
            mlp_norm=block.get_submodule(parts.mlp_norm).weight.detach(),
            head_norms=self._head_norms(block, 1.0),
        )

    def _adapted_block(self, index: int, factors: Factors) -> Block:
        """The frozen block with the adapter's factors beside its weights."""
        parts, frozen = self._parts, self._frozen[index]

        def take(path: str) -> tuple[Tensor, Tensor]:
            weight = self._weight(index, path)
            down, up = factors.take(weight.shape, weight.device, self._name(index, path))
            return down.to(self.dtype), (factors.scaling * up).to(self.dtype)

        def adapted(projection: Projection, path: str) -> Projection:
            down, up = take(path)
            return AdaptedProjection(projection, down, up) if len(down) else projection

        query, key, value = (take(path) for path in (parts.query, parts.key, parts.value))
        down = torch.cat([query[0], key[0], value[0]])
        # The three share their input: one product each for their first and their second factors.
        up = torch.block_diag(
            _pair(query[1], self.shape.heads), _pair(key[1], self.shape.groups), value[1]
        )
        joined = frozen.query_key_value
        return dataclasses.replace(
            frozen,
            query_key_value=AdaptedProjection(joined, down, up) if len(down) else joined,
            output=adapted(frozen.output, parts.output),
            gate=adapted(frozen.gate, parts.gate),
            up=adapted(frozen.up, parts.up),
            down=adapted(frozen.down, parts.down),
        )

    def _weight(self, index: int, path: str) -> Tensor:
        block = blocks_of(self._model)[index]
        return plain_linear(block.get_submodule(path)).weight.detach()

    def _name(self, index: int, path: str) -> str:
        """A projection's name in the causal model."""
        return f"{self._family.decoder}.{self._family.blocks}.{index}.{path}"

    def _join(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([_pair(query, self.shape.heads), _pair(key, self.shape.groups), value])

    def _head_norms(self, block: nn.Module, query_scale: float) -> Tensor | None:
        """[heads + groups, head_dim] in the order of `_pair`; None where heads have no norms."""
        query, key = self._parts.query_norm, self._parts.key_norm
        if query is None or key is None:
            return None
        of_query, of_key = (
            _pair(block.get_submodule(path).weight.detach().float(), 1) for path in (query, key)
        )
        heads = [(of_query * query_scale).expand(self.shape.heads, -1)]
        return torch.cat([*heads, of_key.expand(self.shape.groups, -1)]).to(self.dtype)

    def _joined_bias(self, block: nn.Module, query_scale: float) -> Tensor | None:
        parts = self._parts
        if self._family.biases == "none":
            return None
        query, key, value = (
            plain_linear(block.get_submodule(path)).bias.detach().float()
            for path in (parts.query, parts.key, parts.value)
        )
        return self._join(query * query_scale, key, value).to(self.dtype)

    def _projection(self, weight: Tensor, bias: Tensor | None = None) -> Projection:
        return make_projection(weight.to(self.dtype), bias, rows=self._rows)

    # running --------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """[...] ids below vocab_size -> [..., d_model]."""
        return F.embedding(ids, self._embedding)

    def logits(self, stream: Tensor) -> Tensor:
        """Residual stream after the last block [rows, d_model] -> [rows, vocab]."""
        return self._head(self._normalise(stream, self._final_norm))

    def places(self, length: int) -> Tensor:
        """cos + i sin of every position below `length` and every frequency.

        [length, 1, head_dim / 2] complex64.
        """
        if len(self._rotations) < length:
            angles = torch.outer(
                torch.arange(length, device=self.device).float(), self._frequencies.to(self.device)
            )
            rotations = torch.polar(torch.full_like(angles, self._rotary_scale), angles)
            # The library holds cosine and sine in the weights' type.
            rounded = torch.view_as_real(rotations).to(self.dtype).float()
            self._rotations = torch.view_as_complex(rounded)
        return self._rotations[:length].unsqueeze(1)

    def prefill(self, embedded: Tensor, prefix: KeysValues) -> tuple[Tensor, KeysValues]:
        """Run [rows, seq, d_model] after a common prefix.

        Returns the stream at the last token [rows, d_model], and the new tokens' keys and values.
        """
        rows, seq, d_model = embedded.shape
        shape, start = self.shape, prefix.keys.shape[3]
        rotation = self.places(start + seq)[start:].repeat(rows, 1, 1)
        future = (
            torch.full((seq, seq), -torch.inf, dtype=self.dtype, device=self.device)
            .triu(1)
            .repeat(shape.share, 1)
        )
        new_keys_values = KeysValues.empty(shape, rows, seq, dtype=self.dtype, device=self.device)
        keys, values = new_keys_values.keys, new_keys_values.values
        stream = embedded.reshape(rows * seq, d_model)
        for layer, block in enumerate(self._blocks):
            query, new = self._attention_inputs(block, stream, rotation)
            new = new.view(rows, seq, 2, shape.groups, shape.head_dim).permute(2, 0, 3, 1, 4)
            keys[layer], values[layer] = new[0], new[1]
            query = query.view(rows, seq, shape.groups, shape.share, shape.head_dim).permute(
                0, 2, 3, 1, 4
            )
            mixed = _attend(
                query.reshape(rows, shape.groups, shape.share * seq, shape.head_dim),
                keys[layer],
                values[layer],
                future,
                prefix.keys[layer, 0],
                prefix.values[layer, 0],
            )
            mixed = mixed.view(rows, shape.groups, shape.share, seq, shape.head_dim).permute(
                0, 3, 1, 2, 4
            )
            stream = self._after_attention(
                block, mixed.reshape(rows * seq, shape.query_width), stream
            )
        return stream.view(rows, seq, d_model)[:, -1], new_keys_values

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

        `tail` holds keys and values of [layers, rows, groups, columns, head_dim]; the new ones are
        written to `column`, a number or [1] int64. `hidden` [rows * groups, 1, columns] is 0 where
        a row may look and -inf elsewhere; `places` [rows, 1, head_dim / 2].
        """
        shape, stream, rows = self.shape, embedded, len(embedded)
        for layer, block in enumerate(self._blocks):
            query, new = self._attention_inputs(block, stream, places)
            keys, values = tail.keys[layer], tail.values[layer]
            new = new.view(rows, 2, shape.groups, shape.head_dim)
            if isinstance(column, int):
                keys[:, :, column].copy_(new[:, 0])
                values[:, :, column].copy_(new[:, 1])
            else:
                keys.index_copy_(2, column, new[:, 0].unsqueeze(2))
                values.index_copy_(2, column, new[:, 1].unsqueeze(2))
            mixed = _attend(
                query.view(rows, shape.groups, shape.share, shape.head_dim),
                keys,
                values,
                hidden,
                prefix.keys[layer, 0],
                prefix.values[layer, 0],
            )
            stream = self._after_attention(block, mixed.view(rows, shape.query_width), stream)
        return stream

    def _attention_inputs(
        self, block: Block, stream: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries, and rotated keys with values.

        [rows, heads * head_dim] and [rows, 2 * groups * head_dim].
        """
        shape = self.shape
        joined = block.query_key_value(self._normalise(stream, block.attention_norm))
        rotated = joined[:, : shape.rotated_width]
        if block.head_norms is not None:
            heads = rotated.view(len(joined), shape.heads + shape.groups, shape.head_dim)
            heads.copy_(self._normalise(heads, block.head_norms))
        pairs = rotated.view(len(joined), shape.heads + shape.groups, shape.head_dim // 2, 2)
        # There are no complex numbers of two bfloat16; float32 stays where it is.
        turned = torch.view_as_complex(pairs.float()).mul_(rotation)
        if not self.merged:
            turned[:, : shape.heads].mul_(self._scale)
        if self.dtype != torch.float32:
            pairs.copy_(torch.view_as_real(turned))
        return joined[:, : shape.query_width], joined[:, shape.query_width :]

    def _after_attention(self, block: Block, mixed: Tensor, stream: Tensor) -> Tensor:
        stream = block.output.plus(mixed, stream)
        normalised = self._normalise(stream, block.mlp_norm)
        return block.down.plus(block.up.times(normalised, block.gate.silu(normalised)), stream)

    def _normalise(self, stream: Tensor, weight: Tensor | None) -> Tensor:
        """RMSNorm; without its weight where that is part of the next projection."""
        normalised = F.rms_norm(stream, stream.shape[-1:], None, self.shape.epsilon)
        return normalised if weight is None else normalised.mul_(weight)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
) -> Tensor:
    """Attention of queries over a common prefix and over the tail of each row.

    Queries [rows, groups, queries, head_dim], prefix [groups, prefix, head_dim], tail [rows,
    groups, tail, head_dim]; `hidden` is added to the tail's scores. The prefix is one product per
    group for all rows.
    """
    rows, groups, queries, head_dim = query.shape
    tail, prefix = keys.shape[2], prefix_keys.shape[1]
    tail_scores = torch.baddbmm(
        hidden,
        query.reshape(rows * groups, queries, head_dim),
        keys.reshape(rows * groups, tail, head_dim).mT,
    )
    by_group = query.transpose(0, 1).reshape(groups, rows * queries, head_dim)
    prefix_scores = (
        torch.bmm(by_group, prefix_keys.mT).view(groups, rows, queries, prefix).transpose(0, 1)
    )
    scores = torch.cat((prefix_scores, tail_scores.view(rows, groups, queries, tail)), -1)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    tail_shares = shares.view(rows * groups, queries, prefix + tail)[..., prefix:]
    mixed = torch.bmm(tail_shares, values.reshape(rows * groups, tail, head_dim)).view(
        rows, groups, queries, head_dim
    )
    by_group = shares[..., :prefix].transpose(0, 1).reshape(groups, rows * queries, prefix)
    return mixed.add_(
        torch.bmm(by_group, prefix_values).view(groups, rows, queries, head_dim).transpose(0, 1)
    )


def _parts_of(config: Any) -> BlockParts:
    """Where a block's parts are. Raises ValueError for a base of which they do not tell all."""
    parts, beyond = family_of(config).parts, beyond_parts(config)
    if parts is None or beyond:
        raise ValueError(
            f"compact engine: got {', '.join(beyond)}, expected blocks of RMSNorm, rotary positions"
            " and a silu MLP. Generate with the plain engine, which runs every base."
        )
    return parts


def _projections(block: Block) -> tuple[Projection, ...]:
    return block.query_key_value, block.output, block.gate, block.up, block.down


def _can_take_over(before: Block, after: Block) -> bool:
    """Whether two blocks differ in nothing but the numbers of an adapter of one shape."""
    return all(
        isinstance(old, AdaptedProjection)
        and isinstance(new, AdaptedProjection)
        and old.factor_shapes == new.factor_shapes
        for old, new in zip(_projections(before), _projections(after), strict=True)
    )


def _take_over(before: Block, after: Block) -> None:
    for old, new in zip(_projections(before), _projections(after), strict=True):
        old.copy_factors(new)


def _fold(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """The projection [out, in] of a normalised input whose norm has these weights [in]."""
    return weight.detach().float() * norm_weight.detach().float()


def _pair(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + head_dim / 2 of every head, which a rotation mixes, put side by side.

    [heads * head_dim, ...] -> the same shape.
    """
    halves = weight.view(heads, 2, len(weight) // (2 * heads), *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
