"""A compact decoder for Llama-like models, made for generation after a common prefix.

Reads the weights of a transformers model with a LoRA adapter merged in, and arranges them for few,
large operations: norm weights folded into the next projection, queries, keys and values in one
product, rotary pairs side by side so that a rotation is one complex product, attention scale inside
the query weights. Knows nothing of sampling or scheduling.

Dimension words: rows (sequences), seq, d_model, heads, groups (key-value heads), share (query heads
per group), head_dim, prefix (tokens common to all rows), tail (a row's own tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nla_ray.base.adapters import plain_linear
from nla_ray.base.families import blocks_of, causal_model, decoder_of, decoder_shape, family_of
from nla_ray.description.engines.projection import Projection, make_projection

_ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Block:
    """The projections of one decoder block, norms folded in."""

    query_key_value: Projection
    output: Projection
    gate: Projection
    up: Projection
    down: Projection


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of the same tokens in every block.

    Each is [layers, rows, groups, seq, head_dim].
    """

    keys: Tensor
    values: Tensor


class Decoder:
    """Runs the blocks of one model under one set of adapter weights."""

    def __init__(self, model: nn.Module, *, rows: int) -> None:
        """`rows`: how many sequences a step usually has; the weights are packed for that."""
        self.shape = decoder_shape(causal_model(model).config)
        self._model, self._rows = causal_model(model), rows
        self._family = family = family_of(model)
        decoder = decoder_of(model)
        embedding = decoder.get_submodule(family.embedding).weight.detach()
        self.dtype, self.device = embedding.dtype, embedding.device
        self._embedding, self.d_model = embedding, embedding.shape[1]
        final_norm = decoder.get_submodule(family.final_norm).weight.detach()
        self._head = self._projection(
            _fold(self._model.get_submodule(family.head).weight, final_norm)
        )
        rotary = decoder.get_submodule(family.rotary)
        self._frequencies, self._rotary_scale = (
            rotary.inv_freq.detach().float(),
            float(rotary.attention_scaling),
        )
        self._rotations = torch.empty(0)
        self._blocks: list[Block] = []

    def load(self, state: Mapping[str, Tensor] | None, scaling: float) -> None:
        """Merge an adapter into a copy of the weights; None: the plain base.

        `state`: tensors as `adapters.adapter_state` names them. `scaling` = alpha / rank. Raises
        ValueError for tensors that belong to no projection of this model.
        """
        remaining = dict(state or {})
        self._blocks = [
            self._build_block(index, remaining, scaling) for index in range(self.shape.layers)
        ]
        if remaining:
            raise ValueError(
                f"adapter weights: got {len(remaining)} tensors without a place, first"
                f" {sorted(remaining)[0]!r}, expected LoRA factors such as"
                f" '{_ADAPTER_PREFIX}{self._family.decoder}.{self._family.blocks}.0."
                f"{self._family.query}.lora_A.weight' in {self.shape.layers} blocks. They are of"
                " another base."
            )

    def _build_block(self, index: int, state: dict[str, Tensor], scaling: float) -> Block:
        family, shape = self._family, self.shape
        block = blocks_of(self._model)[index]
        block_name = f"{_ADAPTER_PREFIX}{family.decoder}.{family.blocks}.{index}"

        def merged(path: str) -> Tensor:
            weight = plain_linear(block.get_submodule(path)).weight
            return _merge(weight, state, f"{block_name}.{path}", scaling)

        paths = (family.query, family.key, family.value)
        query, key, value = (merged(path) for path in paths)
        scale = shape.head_dim**-0.5
        joined = torch.cat([_pair(query, shape.heads) * scale, _pair(key, shape.groups), value])
        bias = None
        if family.has_qkv_biases:
            query, key, value = (
                plain_linear(block.get_submodule(path)).bias.detach().float() for path in paths
            )
            bias = torch.cat(
                [_pair(query, shape.heads) * scale, _pair(key, shape.groups), value]
            ).to(self.dtype)
        before = block.get_submodule(family.attention_norm).weight
        after = block.get_submodule(family.mlp_norm).weight
        return Block(
            query_key_value=self._projection(_fold(joined, before), bias),
            output=self._projection(merged(family.output)),
            gate=self._projection(_fold(merged(family.gate), after)),
            up=self._projection(_fold(merged(family.up), after)),
            down=self._projection(merged(family.down)),
        )

    def _projection(self, weight: Tensor, bias: Tensor | None = None) -> Projection:
        return make_projection(weight.to(self.dtype), bias, rows=self._rows)

    # running --------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """[...] ids below vocab_size -> [..., d_model]."""
        return F.embedding(ids, self._embedding)

    def logits(self, stream: Tensor) -> Tensor:
        """Residual stream after the last block [rows, d_model] -> [rows, vocab]."""
        return self._head(self._normalise(stream))

    def rotations(self, length: int) -> Tensor:
        """cos + i sin of every position below `length` and every frequency.

        [length, head_dim / 2] complex64.
        """
        if len(self._rotations) < length:
            angles = torch.outer(
                torch.arange(length, device=self.device).float(), self._frequencies.to(self.device)
            )
            self._rotations = torch.polar(torch.full_like(angles, self._rotary_scale), angles)
        return self._rotations[:length]

    def empty_prefix(self) -> KeysValues:
        """The prefix of no tokens."""
        shape = self.shape
        nothing = torch.empty(
            shape.layers, 1, shape.groups, 0, shape.head_dim, dtype=self.dtype, device=self.device
        )
        return KeysValues(nothing, nothing)

    def prefill(self, embedded: Tensor, prefix: KeysValues) -> tuple[Tensor, KeysValues]:
        """Run [rows, seq, d_model] after a common prefix.

        Returns the stream at the last token [rows, d_model], and the new tokens' keys and values.
        """
        rows, seq, d_model = embedded.shape
        shape, start = self.shape, prefix.keys.shape[3]
        rotation = self.rotations(start + seq)[start:].repeat(rows, 1).unsqueeze(1)
        future = (
            torch.full((seq, seq), -torch.inf, dtype=self.dtype, device=self.device)
            .triu(1)
            .repeat(shape.share, 1)
        )
        keys = torch.empty(
            shape.layers,
            rows,
            shape.groups,
            seq,
            shape.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        values = torch.empty_like(keys)
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
        return stream.view(rows, seq, d_model)[:, -1], KeysValues(keys, values)

    def step(
        self,
        embedded: Tensor,
        rotation: Tensor,
        tail: KeysValues,
        column: int,
        hidden: Tensor,
        prefix: KeysValues,
    ) -> Tensor:
        """One token per row: [rows, d_model] -> the stream after the last block.

        `tail` holds keys and values of [layers, rows, groups, columns, head_dim]; the new ones are
        written to `column`. `hidden` [rows * groups, 1, columns] is 0 where a row may look and -inf
        elsewhere; `rotation` [rows, 1, head_dim / 2].
        """
        shape, stream, rows = self.shape, embedded, len(embedded)
        for layer, block in enumerate(self._blocks):
            query, new = self._attention_inputs(block, stream, rotation)
            keys, values = tail.keys[layer], tail.values[layer]
            new = new.view(rows, 2, shape.groups, shape.head_dim)
            keys[:, :, column].copy_(new[:, 0])
            values[:, :, column].copy_(new[:, 1])
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
        joined = block.query_key_value(self._normalise(stream))
        rotated = joined[:, : shape.rotated_width]
        pairs = rotated.view(len(joined), shape.heads + shape.groups, shape.head_dim // 2, 2)
        if self.dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(rotation)
        else:  # there are no complex numbers of two bfloat16
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * rotation))
        return joined[:, : shape.query_width], joined[:, shape.query_width :]

    def _after_attention(self, block: Block, mixed: Tensor, stream: Tensor) -> Tensor:
        stream = block.output.plus(mixed, stream)
        normalised = self._normalise(stream)
        return block.down.plus(block.up.times(normalised, block.gate.silu(normalised)), stream)

    def _normalise(self, stream: Tensor) -> Tensor:
        """RMSNorm without its weight, which is part of the next projection."""
        return F.rms_norm(stream, stream.shape[-1:], None, self.shape.epsilon)


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


def _merge(weight: Tensor, state: dict[str, Tensor], name: str, scaling: float) -> Tensor:
    """weight + scaling * B A in float32; the factors are taken out of `state`."""
    weight = weight.detach().float()
    down, up = state.pop(f"{name}.lora_A.weight", None), state.pop(f"{name}.lora_B.weight", None)
    if down is None or up is None:
        return weight
    if (
        up.shape[0] != weight.shape[0]
        or down.shape[1] != weight.shape[1]
        or up.shape[1] != down.shape[0]
    ):
        raise ValueError(
            f"adapter weights {name}: got factors {tuple(up.shape)} and {tuple(down.shape)} for a"
            f" weight of {tuple(weight.shape)}, expected [out, rank] and [rank, in]. They are of"
            " another base."
        )
    return torch.addmm(
        weight, up.to(weight.device).float(), down.to(weight.device).float(), alpha=scaling
    )


def _fold(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """The projection [out, in] of a normalised input whose norm has these weights [in]."""
    return weight.detach().float() * norm_weight.detach().float()


def _pair(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + head_dim / 2 of every head, which a rotation mixes, put side by side.

    [heads * head_dim, ...] -> the same shape.
    """
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
