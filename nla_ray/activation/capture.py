"""Runs blocks 0..K of a base and keeps the residual stream at wanted positions.

It knows no run directory. Protects the rule that what is captured depends on the text and the base
alone, not on what else was in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from nla_ray.activation.bank import TEXT_COLUMNS, activation_id
from nla_ray.activation.positions import EncodedText, plan_batches
from nla_ray.settings.config import BaseConfig, CaptureConfig


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
        counts = [len(text.positions) for text in texts]
        rows = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(counts)).to(
            self._device
        )
        positions = [position for text in texts for position in text.positions]
        columns = torch.tensor(positions, device=self._device)
        with torch.inference_mode():
            residual = self._residual.read(ids.to(self._device))
            kept = {
                layer: values[rows, columns].float().cpu() for layer, values in residual.items()
            }
        return {
            layer: [part.numpy() for part in values.split(counts)] for layer, values in kept.items()
        }


class Capture:
    """The actor of the capture stage: a table of encoded texts in, a table of activations out."""

    def __init__(self, base: BaseConfig, capture: CaptureConfig, threads: int) -> None:
        import torch

        from nla_ray.base.load import load_backbone
        from nla_ray.base.self_check import check_reading

        torch.set_num_threads(threads)
        layers = wanted_layers(base, capture)
        model = load_backbone(base, num_blocks=layers[-1] + 1)
        check_reading(model, layers)
        self._reader = ActivationReader(model, layers, capture.batch_tokens)

    def __call__(self, texts: pa.Table) -> pa.Table:
        """Columns of `read_texts` -> those of `activation_schema`, one row an activation.

        Texts that are left out come last.
        """
        kept = texts.filter(texts["skipped"].is_null())
        left_out = texts.filter(texts["skipped"].is_valid())
        encoded = [
            EncodedText(ids=ids, positions=positions, ends=ends)
            for ids, positions, ends in zip(
                *(kept[name].to_pylist() for name in ("ids", "positions", "ends")), strict=True
            )
        ]
        vectors = self._reader.read(encoded)
        rows = [
            (row, layer, slot)
            for row, text in enumerate(encoded)
            for layer in self._reader.layers
            for slot in range(len(text.positions))
        ]
        activations = np.array([vectors[layer][row][slot] for row, layer, slot in rows], np.float32)
        activations = activations.reshape(-1, self._reader.d_model)  # also where there is none
        positions = [encoded[row].positions[slot] for row, _, slot in rows]
        whole = kept["text"].to_pylist()
        read = [whole[row][: encoded[row].ends[slot]] for row, _, slot in rows]
        taken = kept.take(pa.array([row for row, _, _ in rows], pa.int64()))
        found = _activation_rows(
            taken.set_column(taken.column_names.index("text"), "text", pa.array(read, pa.string())),
            activations,
            [layer for _, layer, _ in rows],
            positions,
            [
                encoded[row].ids[position]
                for (row, _, _), position in zip(rows, positions, strict=True)
            ],
        )
        none = [-1] * len(left_out)
        zeros = np.zeros((len(left_out), self._reader.d_model), np.float32)
        return pa.concat_tables([found, _activation_rows(left_out, zeros, none, none, none)])


def _activation_rows(
    texts: pa.Table,
    activations: np.ndarray,
    layers: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
) -> pa.Table:
    """Rows of texts with their activations [rows, d_model].

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
    columns = {name: texts[name] for name in ("shard", *TEXT_COLUMNS, "num_tokens")}
    return pa.table(
        {
            **columns,
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
