"""Runs blocks 0..K of a base and keeps the residual stream at wanted positions.

It knows no run directory. Protects the rule that what is captured depends on the text and the base
alone, not on what else was in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nla_ray.activation.bank import activation_id
from nla_ray.activation.positions import MEAN_POSITION, EncodedText, padded_tokens, plan_batches
from nla_ray.run.blocks import activation_row_bytes, gather_blocks
from nla_ray.settings.config import BaseConfig, CaptureConfig

if TYPE_CHECKING:
    from torch import Tensor

NO_TOKEN = -1
"""In place of a token's id, where an activation is a mean over tokens."""
_IDENTITY = ["shard", "text_id", "doc_id", "split", "domain", "num_tokens", "skipped"]
"""Columns of a text that each of its activations has."""


def wanted_layers(base: BaseConfig, capture: CaptureConfig) -> tuple[int, ...]:
    """The base's layer and any further ones, ascending."""
    return tuple(sorted({base.layer, *capture.layers}))


class ActivationReader:
    """A base model's blocks 0..K, and the vectors they leave at wanted positions."""

    def __init__(self, model, layers: Sequence[int], batch_tokens: int) -> None:
        from nla_ray.base.layers import ResidualReader

        self._residual, self._device, self._batch_tokens = (
            ResidualReader(model, layers),
            model.device,
            batch_tokens,
        )
        self.layers, self.d_model = self._residual.layers, model.config.hidden_size

    def read(self, texts: Sequence[EncodedText]) -> dict[int, list[np.ndarray]]:
        """For every layer one float32 array [positions, d_model] a text, in the order given."""
        found: dict[int, list[np.ndarray]] = {
            layer: [np.empty(0)] * len(texts) for layer in self.layers
        }
        for batch in plan_batches([len(text.ids) for text in texts], self._batch_tokens):
            for layer, arrays in self._read_batch([texts[i] for i in batch]).items():
                for index, array in zip(batch, arrays, strict=True):
                    found[layer][index] = array
        return found

    def _read_batch(self, texts: Sequence[EncodedText]) -> dict[int, list[np.ndarray]]:
        import torch

        ids = torch.zeros(len(texts), max(len(text.ids) for text in texts), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
        wanted = [(row, at) for row, text in enumerate(texts) for at in text.read_positions]
        rows, columns = torch.tensor(wanted).unbind(1)
        with torch.inference_mode():
            residual = self._residual.read(ids.to(self._device))
            return {
                layer: self._wanted(
                    values[rows.to(values.device), columns.to(values.device)].float(), texts
                )
                for layer, values in residual.items()  # on the device of their block
            }

    def _wanted(self, values: Tensor, texts: Sequence[EncodedText]) -> list[np.ndarray]:
        """An array a text; `values`: what was read in all texts, float32 [tokens, d_model]."""
        import torch

        parts = values.split([len(text.read_positions) for text in texts])
        if any(text.averaged for text in texts):  # before what is averaged leaves the device
            parts = [_averaged(part, text) for part, text in zip(parts, texts, strict=True)]
            values = torch.cat(parts)
        kept = values.cpu().split([len(text.positions) for text in texts])
        return [part.numpy() for part in kept]


def _averaged(read: Tensor, text: EncodedText) -> Tensor:
    """What was read of a text with the mean of its last rows in place of them."""
    import torch

    if not text.averaged:
        return read
    count = len(text.own_positions)
    return torch.cat([read[:count], read[count:].mean(0, keepdim=True)])


@dataclass(frozen=True, kw_only=True)
class CapturedBlock:
    """Some activations of a shard, as many as are held at once.

    Example: CapturedBlock(rows=<8,248 rows>, padded_tokens=20_480)
    """

    rows: pa.Table
    """Columns of `activation_schema`, and `shard`, `num_tokens` and `skipped`."""
    padded_tokens: int
    """Of the forward passes that were made for it, padding included."""


class Capture:
    """A table of encoded texts in, blocks of their activations out."""

    def __init__(
        self, base: BaseConfig, capture: CaptureConfig, threads: int, num_gpus: int = 1
    ) -> None:
        """`num_gpus`: as `load_backbone` takes it."""
        import torch

        from nla_ray.base.load import load_backbone
        from nla_ray.base.self_check import check_reading

        torch.set_num_threads(threads)
        layers = wanted_layers(base, capture)
        self._batch_tokens = capture.batch_tokens
        model = load_backbone(base, num_blocks=layers[-1] + 1, num_gpus=num_gpus)
        check_reading(model, layers)
        self._reader = ActivationReader(model, layers, capture.batch_tokens)

    def __call__(self, texts: pa.Table) -> Iterator[CapturedBlock]:
        """Columns of `read_texts` -> the shard's activations, a row each, in blocks.

        Texts that are left out are the last block. Held at once are the activations of some texts,
        of at most BLOCK_BYTES or of one text, and a block of their rows.
        """
        kept = texts.filter(texts["skipped"].is_null())
        names = ("ids", "positions", "averaged", "ends")
        encoded = [
            EncodedText(**dict(zip(names, values, strict=True)))
            for values in zip(*(kept[name].to_pylist() for name in names), strict=True)
        ]
        size = activation_row_bytes(self._reader.d_model, 0) * len(self._reader.layers)
        start = 0
        for part in gather_blocks(encoded, lambda text: size * len(text.positions)):
            yield from self._captured(kept.slice(start, len(part)), part)
            start += len(part)
        left_out = texts.filter(texts["skipped"].is_valid())
        none = [-1] * len(left_out)
        zeros = np.zeros((len(left_out), self._reader.d_model), np.float32)
        rows = _activation_rows(left_out, left_out["text"].to_pylist(), zeros, none, none, none)
        yield CapturedBlock(rows=rows, padded_tokens=0)

    def _captured(self, texts: pa.Table, encoded: list[EncodedText]) -> Iterator[CapturedBlock]:
        """The activations of texts that are read together."""
        vectors, d_model = self._reader.read(encoded), self._reader.d_model
        padded = padded_tokens([len(text.ids) for text in encoded], self._batch_tokens)
        whole, names = texts["text"].to_pylist(), texts["text_id"].to_pylist()
        identity = texts.select(_IDENTITY)
        rows = [
            (row, layer, slot)
            for row, text in enumerate(encoded)
            for layer in self._reader.layers
            for slot in range(len(text.positions))
        ]

        def size_of(wanted: tuple[int, int, int]) -> int:
            row, _, slot = wanted
            return activation_row_bytes(d_model, encoded[row].ends[slot] + 3 * len(names[row]))

        for chosen in gather_blocks(rows, size_of):
            positions = [encoded[row].positions[slot] for row, _, slot in chosen]
            rows_of_block = _activation_rows(
                identity.take(pa.array([row for row, _, _ in chosen], pa.int64())),
                [whole[row][: encoded[row].ends[slot]] for row, _, slot in chosen],
                np.array([vectors[layer][row][slot] for row, layer, slot in chosen], np.float32),
                [layer for _, layer, _ in chosen],
                positions,
                [
                    NO_TOKEN if position == MEAN_POSITION else encoded[row].ids[position]
                    for (row, _, _), position in zip(chosen, positions, strict=True)
                ],
            )
            held = [CapturedBlock(rows=rows_of_block, padded_tokens=padded)]
            del rows_of_block
            yield held.pop()  # whoever takes the block holds it alone
            padded = 0


def _activation_rows(
    texts: pa.Table,
    read: Sequence[str],
    activations: np.ndarray,
    layers: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
) -> pa.Table:
    """Rows of texts with what is `read` of each and their activations [rows, d_model].

    A vector that is not finite is marked as skipped.
    """
    ids = [
        activation_id(text_id, layer, position)
        for text_id, layer, position in zip(
            texts["text_id"].to_pylist(), layers, positions, strict=True
        )
    ]
    finite = np.logical_and.reduce(np.isfinite(activations), axis=1)
    skipped = [
        reason
        or (None if ok else f"non_finite: {name} holds NaN or infinity, expected finite numbers")
        for reason, ok, name in zip(texts["skipped"].to_pylist(), finite, ids, strict=True)
    ]
    return pa.table(
        {
            **{name: texts[name] for name in _IDENTITY},
            "text": pa.array(read, pa.string()),
            "skipped": pa.array(skipped, pa.string()),
            "activation_id": pa.array(ids, pa.string()),
            "position": pa.array(positions, pa.int32()),
            "token": pa.array(tokens, pa.int32()),
            "layer": pa.array(layers, pa.int32()),
            "activation": pa.FixedSizeListArray.from_arrays(
                pa.array(activations.reshape(-1)), activations.shape[1]
            ),
        }
    )
