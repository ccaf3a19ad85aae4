"""Directions from a file of another tool: rows of an SAE's decoder, steering or LoRA vectors.

Knows the formats of NumPy, PyTorch and safetensors, and no run. Protects the rule that a vector is
named by where it stands in its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

_SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth", ".bin")


def read_directions(
    path: str | Path, d_model: int, *, tensor: str | None = None
) -> dict[str, Tensor]:
    """The vectors of a file by name: each [d_model] float32, as it stands there.

    `path`: a .safetensors, .npy, .npz or PyTorch file (read without running code). A tensor of
    [d_model] is a vector, one of [n, d_model] or [d_model, n] is n vectors named `tensor[0]` on.
    `tensor`: read this one alone, by its name in the file. Raises ValueError for a file without
    such a tensor, and FileNotFoundError for none.

    Example: read_directions("sae.safetensors", 576, tensor="W_dec")["W_dec[31]"]
    """
    path = Path(path)
    tensors = _tensors(path)
    if tensor is not None and tensor not in tensors:
        raise ValueError(
            f"{path}: got tensors {sorted(tensors)}, expected {tensor!r} among them. Name one of"
            " these."
        )
    chosen = tensors if tensor is None else {tensor: tensors[tensor]}
    found: dict[str, Tensor] = {}
    for name, value in chosen.items():
        if value.shape == (d_model,):
            found[name] = value.float()
        elif value.ndim == 2 and d_model in value.shape:
            rows = value if value.shape[1] == d_model else value.T
            found |= {f"{name}[{number}]": row.float() for number, row in enumerate(rows)}
    if not found:
        shapes = {name: list(value.shape) for name, value in chosen.items()}
        raise ValueError(
            f"{path}: got tensors of shapes {shapes}, expected one of [{d_model}] or"
            f" [n, {d_model}], the base's d_model. The file is of another model or layer."
        )
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name; that of an .npy file is named as the file is."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path}: got a file {path.suffix or 'without ending'}, expected one of"
            f" {', '.join(_SUFFIXES)}. Save the vectors in one of these."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix in (".npy", ".npz"):
        import numpy as np

        loaded = np.load(path, allow_pickle=False)
        arrays = loaded if isinstance(loaded, Mapping) else {path.stem: loaded}
        numeric = {name: array for name, array in arrays.items() if array.dtype.kind in "fiu"}
        return {name: torch.from_numpy(array) for name, array in numeric.items()}
    try:
        return _flat(torch.load(path, map_location="cpu", weights_only=True), path.stem)
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: got objects that only running code can read"
            f" ({str(error).splitlines()[0]}), expected tensors in dictionaries and lists. Save the"
            " tensors alone, as .safetensors."
        ) from None


def _flat(value: Any, name: str, above: str = "") -> dict[str, Tensor]:
    """Tensors in nested dictionaries and lists, by the keys that lead to them."""
    if isinstance(value, Tensor):
        return {above or name: value}
    items = enumerate(value) if isinstance(value, list | tuple) else None
    if isinstance(value, Mapping):
        items = value.items()
    found: dict[str, Tensor] = {}
    for key, inner in items or ():
        found |= _flat(inner, name, f"{above}.{key}" if above else str(key))
    return found
