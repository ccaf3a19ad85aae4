"""Activations as rows: the Arrow schema of a captured row, and the table of one split and layer.

It knows neither models nor run directories. Protects the rule that row i of every field belongs
together, in the order of activation_id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nla_ray.text.chunks import TEXT_FIELDS

if TYPE_CHECKING:
    from torch import Tensor


_MEAN = "mean"
"""In place of the position in an activation's id."""


def activation_schema(d_model: int) -> pa.Schema:
    """One residual-stream vector a row, raw float32, never normalised.

    `activation_id` is `{text_id}@{layer}:{position}`; `position` is the 0-based index of the token
    in the chat-formatted prompt and the base's answer, `token` its id. `text` is what the model has
    read there: the text up to the position, the whole of it at the prompt's last token; inside the
    answer a conversation, as `join_turns` writes it, up to the position. A mean over tokens stands
    at none: its id ends in `mean`, `position` and `token` are -1, and `text` ends with its last
    token.
    """
    return pa.schema(
        [
            pa.field("activation_id", pa.string(), nullable=False),
            *TEXT_FIELDS,
            pa.field("text", pa.string(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token", pa.int32(), nullable=False),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("activation", pa.list_(pa.float32(), d_model), nullable=False),
        ]
    )


def activation_id(text_id: str, layer: int, position: int) -> str:
    """The identity of one captured vector.

    >>> activation_id("a#0", layer=4, position=31), activation_id("a#0", layer=4, position=-1)
    ('a#0@4:31', 'a#0@4:mean')
    """
    return f"{text_id}@{layer}:{_MEAN if position < 0 else position}"


TEXT_COLUMNS = ["text_id", "doc_id", "split", "domain", "text"]


@dataclass(frozen=True, kw_only=True)
class ActivationTable:
    """Activations of one split and layer, sorted by activation_id.

    Example: ActivationTable(ids=["a#0@4:31"], text_ids=["a#0"], doc_ids=["a"],
    family_ids=["a"], domains=["licence"], texts=["..."], vectors=<float32 [1, d_model]>)
    """

    ids: list[str]
    text_ids: list[str]
    doc_ids: list[str]
    family_ids: list[str]
    """Of each document: what is of one family is not independent."""
    domains: list[str]
    texts: list[str]
    """What the model has read of each text at the position."""
    vectors: Tensor
    """[rows, d_model] float32, as captured."""
    views: Tensor | None = None
    """[rows, vectors, d_model]: what is injected, where it is not the activation alone."""

    @property
    def injected(self) -> Tensor:
        """What stands in a verbalizer's prompt for each: [rows, vectors, d_model]."""
        return self.vectors[:, None] if self.views is None else self.views

    @property
    def positions(self) -> list[int]:
        """The token of each activation: its 0-based index in the prompt, and its answer after it.

        -1 of a mean over tokens.
        """
        ends = (name.rpartition(":")[2] for name in self.ids)
        return [-1 if end == _MEAN else int(end) for end in ends]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> ActivationTable:
        """The rows at `indices`, in that order."""
        import torch

        chosen = [int(index) for index in indices]
        lists = {
            name: [getattr(self, name)[index] for index in chosen]
            for name in ("ids", "text_ids", "doc_ids", "family_ids", "domains", "texts")
        }
        rows = torch.tensor(chosen, dtype=torch.int64)
        views = None if self.views is None else self.views[rows]
        return ActivationTable(**lists, vectors=self.vectors[rows], views=views)


def activation_matrix(
    activations: pa.ChunkedArray | pa.FixedSizeListArray, d_model: int
) -> np.ndarray:
    """A fixed-size-list column as float32 [rows, d_model]; without a copy when it is one chunk."""
    array = (
        activations.combine_chunks() if isinstance(activations, pa.ChunkedArray) else activations
    )
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, d_model)


def drawn_rows(num_rows: int, most: int, seed: int) -> list[int]:
    """At most so many of the rows, chosen by seed, in their order."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_rows, generator=generator)[:most].tolist())
