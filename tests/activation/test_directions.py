"""Vectors from files of other tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nla_ray.activation.directions import read_directions

DECODER = torch.arange(12.0).view(3, 4)
"""Three directions of width 4."""
STEERING = torch.tensor([1.0, 0.0, -1.0, 2.0])
WRITERS: dict[str, Callable[[Path], object]] = {
    "sae.safetensors": lambda path: save_file(
        {"W_dec": DECODER, "b_enc": torch.zeros(3), "steer": STEERING.half()}, path
    ),
    "sae.npz": lambda path: np.savez(
        path, W_dec=DECODER.numpy(), steer=STEERING.double().numpy(), by=np.array("me")
    ),
    "sae.pt": lambda path: torch.save(
        {"W_dec": DECODER, "steer": STEERING.bfloat16(), "step": 7}, path
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_vector_of_the_width_is_found_and_named_by_its_place(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / name)
    found = read_directions(tmp_path / name, 4)
    assert set(found) == {"W_dec[0]", "W_dec[1]", "W_dec[2]", "steer"}
    assert torch.equal(found["W_dec[1]"], DECODER[1])
    assert torch.equal(found["steer"], STEERING) and found["steer"].dtype == torch.float32
    assert set(read_directions(str(tmp_path / name), 4, tensor="steer")) == {"steer"}


def test_a_lone_array_is_named_as_its_file_and_columns_are_vectors_too(tmp_path: Path) -> None:
    np.save(tmp_path / "probe.npy", DECODER.T.numpy())
    found = read_directions(tmp_path / "probe.npy", 4)
    assert list(found) == ["probe[0]", "probe[1]", "probe[2]"]
    assert torch.equal(found["probe[2]"], DECODER[2])
    torch.save({"layers": [{"v": STEERING}, {"v": STEERING + 1}]}, tmp_path / "nested.pt")
    assert list(read_directions(tmp_path / "nested.pt", 4)) == ["layers.0.v", "layers.1.v"]


def test_what_holds_no_such_vector_is_refused_in_words(tmp_path: Path) -> None:
    save_file({"W_dec": DECODER}, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"shapes \{'W_dec': \[3, 4\]\}, expected one of \[5\]"):
        read_directions(tmp_path / "sae.safetensors", 5)
    with pytest.raises(ValueError, match=r"got tensors \['W_dec'\], expected 'W_enc'"):
        read_directions(tmp_path / "sae.safetensors", 4, tensor="W_enc")
    (tmp_path / "sae.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"got a file \.csv, expected one of \.safetensors"):
        read_directions(tmp_path / "sae.csv", 4)
    torch.save({"W_dec": DECODER, "made_by": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt: got objects that only running code can read"):
        read_directions(tmp_path / "code.pt", 4)
    with pytest.raises(FileNotFoundError):
        read_directions(tmp_path / "none.npy", 4)
