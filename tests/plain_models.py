"""Qwen2, Llama and Gemma 3 written out, from the tensors of a file: the oracle of what is loaded.

Slow and obvious: one text, no cache, float64, a matrix product for every formula. It shares no line
with transformers or with the package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class PlainModel:
    """A model in a folder; blocks of a text are computed one after the other."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.tensors = {name: value.double() for name, value in tensors.items()}
        self.is_gemma = self.config["model_type"].startswith("gemma")

    def embed(self, ids: list[int]) -> Tensor:
        """[seq, d]; Gemma's are scaled after they are looked up."""
        embedded = self.tensors["model.embed_tokens.weight"][ids]
        return embedded * self.config["hidden_size"] ** 0.5 if self.is_gemma else embedded

    def stream(self, embedded: Tensor, blocks: int) -> Tensor:
        """[seq, d] after the first blocks, without any final norm."""
        for block in range(blocks):
            embedded = self._block(embedded, block)
        return embedded

    def logits(self, embedded: Tensor) -> Tensor:
        """[seq, vocab] of all blocks; the output head is the embedding table where it is tied."""
        stream = self.stream(embedded, self.config["num_hidden_layers"])
        normed = self._norm(stream, "model.norm")
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return normed @ head.T

    def greedy(self, embedded: Tensor, end: int, most: int) -> list[int]:
        """Ids that follow, the end included."""
        written: list[int] = []
        while len(written) < most and end not in written:
            token = int(self.logits(torch.cat([embedded, self.embed(written)]))[-1].argmax())
            written.append(token)
        return written

    def _block(self, x: Tensor, block: int) -> Tensor:
        start = f"model.layers.{block}."
        attended = self._attend(self._norm(x, f"{start}input_layernorm"), block)
        if self.is_gemma:
            x = x + self._norm(attended, f"{start}post_attention_layernorm")
            read = self._mlp(self._norm(x, f"{start}pre_feedforward_layernorm"), start)
            return x + self._norm(read, f"{start}post_feedforward_layernorm")
        x = x + attended
        return x + self._mlp(self._norm(x, f"{start}post_attention_layernorm"), start)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[f"{name}.weight"] + (1 if self.is_gemma else 0)
        return x / (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * weight

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.tensors.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))
        return x @ self.tensors[f"{name}.weight"].T + bias

    def _mlp(self, x: Tensor, start: str) -> Tensor:
        gate, up = (self._linear(x, f"{start}mlp.{name}_proj") for name in ("gate", "up"))
        if self.is_gemma:  # GELU by tanh
            inside = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            gate = 0.5 * gate * (1 + inside.tanh())
        else:
            gate = gate * gate.sigmoid()
        return self._linear(gate * up, f"{start}mlp.down_proj")

    def _attend(self, x: Tensor, block: int) -> Tensor:
        start, config = f"model.layers.{block}.self_attn.", self.config
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        q, k, v = (self._linear(x, f"{start}{name}_proj") for name in "qkv")
        q, k, v = q.view(-1, heads, width), k.view(-1, groups, width), v.view(-1, groups, width)
        scale = width**-0.5
        if self.is_gemma:
            q, k = self._norm(q, f"{start}q_norm"), self._norm(k, f"{start}k_norm")
            scale = config["query_pre_attn_scalar"] ** -0.5
        q, k = self._rotate(q, block), self._rotate(k, block)
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        weights = torch.einsum("ihd,jhd->hij", q, k) * scale
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = weights.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        return self._linear(mixed, f"{start}o_proj")

    def _rotate(self, x: Tensor, block: int) -> Tensor:
        rope = self.config["rope_parameters"]
        if self.is_gemma:
            rope = rope[self.config["layer_types"][block]]
        half = x.shape[-1] // 2
        frequencies = rope["rope_theta"] ** -(torch.arange(half, dtype=x.dtype) / half)
        angles = (torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies)[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ],
            -1,
        )
