"""Runs blocks 0..K of a base and keeps the residual stream at wanted positions: [positions,
d_model].

Protects the rule that what is captured depends on the text and the base alone, not on what else
was in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nla_ray.activation.bank import TEXT_COLUMNS, activation_id
from nla_ray.activation.positions import EncodedText, plan_batches
from nla_ray.settings.config import BaseConfig, CaptureConfig

# Running the model --------------------------------------------------------------------------------


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
        """For every layer, one float32 array [positions, d_model] a text, in the order of
        `texts`."""
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
        places = torch.tensor(
            [place for text in texts for place in text.positions], device=self._device
        )
        with torch.inference_mode():
            residual = self._residual.read(ids.to(self._device))
            kept = {layer: values[rows, places].float().cpu() for layer, values in residual.items()}
        return {
            layer: [part.numpy() for part in values.split(counts)] for layer, values in kept.items()
        }


class Capture:
    """The actor of the capture stage: a table of encoded texts in, a table of activations out."""

    def __init__(self, base: BaseConfig, capture: CaptureConfig, threads: int) -> None:
        import torch

        from nla_ray.base.load import load_backbone

        torch.set_num_threads(threads)
        layers = wanted_layers(base, capture)
        self._reader = ActivationReader(
            load_backbone(base, num_blocks=layers[-1] + 1), layers, capture.batch_tokens
        )

    def __call__(self, texts: pa.Table) -> pa.Table:
        """Columns of `read_texts` -> one row an activation (columns of `activation_schema`); texts
        left out come last."""
        is_kept = pc.is_null(texts["skipped"])
        kept, left_out = texts.filter(is_kept), texts.filter(pc.invert(is_kept))
        encoded = [
            EncodedText(ids=ids, positions=positions)
            for ids, positions in zip(
                kept["ids"].to_pylist(), kept["positions"].to_pylist(), strict=True
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
        places = [encoded[row].positions[slot] for row, _, slot in rows]
        found = _activation_rows(
            kept.take(pa.array([row for row, _, _ in rows], pa.int64())),
            activations,
            [layer for _, layer, _ in rows],
            places,
            [encoded[row].ids[place] for (row, _, _), place in zip(rows, places, strict=True)],
        )
        nowhere, nothing = (
            [-1] * len(left_out),
            np.zeros((len(left_out), self._reader.d_model), np.float32),
        )
        return pa.concat_tables(
            [found, _activation_rows(left_out, nothing, nowhere, nowhere, nowhere)]
        )


def _activation_rows(
    texts: pa.Table,
    activations: np.ndarray,
    layers: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
) -> pa.Table:
    """Rows of texts with their activations [rows, d_model]; a vector that is not finite is marked
    as skipped."""
    ids = [
        activation_id(text_id, layer, position)
        for text_id, layer, position in zip(
            texts["text_id"].to_pylist(), layers, positions, strict=True
        )
    ]
    finite = np.isfinite(activations).all(axis=1)
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
