"""Reconstructors of the reference layout, against their formulas written out."""

import json
from pathlib import Path

import pytest
import torch
from plain_models import PlainModel
from reference_layout import (
    FAMILY_NAMES,
    LAYER,
    RECONSTRUCTOR_PROMPT,
    WIDTH,
    change_json,
    tokenizer_of,
    write_reconstructor,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from nla_ray.score.reference import load_reconstructor
from nla_ray.score.scorer import Scorer

TEXTS = ["- a licence that permits", " - code, tests\n- tokens: def "]


def expected_of(folder: Path, family: str) -> Tensor:
    """Embedding, blocks, no final norm, head: [texts, d] float64."""
    model, head = PlainModel(folder), load_file(folder / "value_head.safetensors")
    rows = []
    for text in TEXTS:
        prompt = RECONSTRUCTOR_PROMPT.replace("{explanation}", text.strip())
        ids = tokenizer_of(family)(prompt)["input_ids"]
        stream = model.stream(model.embed(ids), LAYER + 1)[-1]
        bias = head["bias"].double() if "bias" in head else 0
        rows.append(head["weight"].double() @ stream + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_is_the_head_of_the_stream_without_a_final_norm(
    family: str, bias: bool, tmp_path: Path
) -> None:
    write_reconstructor(tmp_path, family, bias=bias, dummies=bias)
    found = load_reconstructor(tmp_path).reconstruct(TEXTS)
    expected = expected_of(tmp_path, family)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_dummies_of_any_shape_are_ignored(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    expected = load_reconstructor(tmp_path).reconstruct(TEXTS)
    tensors["model.norm.weight"] = torch.randn(WIDTH, WIDTH)
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(load_reconstructor(tmp_path).reconstruct(TEXTS), expected)


@pytest.mark.parametrize("start", ["model.language_model.", "language_model.model."])
def test_nested_names_are_read(start: str, tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "llama")
    expected = load_reconstructor(tmp_path).reconstruct(TEXTS)
    rename(tmp_path, lambda name: name.replace("model.", start, 1))
    assert torch.equal(load_reconstructor(tmp_path).reconstruct(TEXTS), expected)


def rename(folder: Path, new_name) -> None:
    file = folder / "model.safetensors"
    renamed = {new_name(name): value for name, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})


def test_names_that_are_not_known_are_no_random_weights(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "llama")
    rename(tmp_path, lambda name: name.replace("layers.1.", "blocks.1."))
    with pytest.raises(ValueError, match=r"no weights .* for 9 tensors, first 'layers\.1\..*'"):
        load_reconstructor(tmp_path)


def test_rows_of_the_head_that_are_not_finite_are_refused_by_number(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2")
    file = tmp_path / "value_head.safetensors"
    weight = load_file(file)["weight"]
    weight[3, 5], weight[17] = torch.nan, torch.inf
    save_file({"weight": weight}, file)
    with pytest.raises(ValueError, match=r"non-finite values in 2 of 64 rows \(3, 17\)"):
        load_reconstructor(tmp_path)


def test_a_head_that_is_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2")
    file = tmp_path / "value_head.safetensors"
    save_file({"weight": torch.zeros(WIDTH, 8)}, file)
    with pytest.raises(ValueError, match=r"got \{'weight': \[64, 8\]\}, expected weight"):
        load_reconstructor(tmp_path)
    save_file({"value_head.weight": torch.ones(WIDTH, WIDTH)}, file)
    assert load_reconstructor(tmp_path).head.weight.sum() == WIDTH**2
    file.unlink()
    with pytest.raises(ValueError, match=r"got 'no value_head.safetensors', expected the head"):
        load_reconstructor(tmp_path)


def test_a_list_of_extra_special_tokens_is_read(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2")
    change_json(tmp_path / "tokenizer_config.json", extra_special_tokens=["<|im_start|>"])
    assert load_reconstructor(tmp_path).encode(["a"])


def test_a_prompt_without_the_token_that_begins_a_text_is_refused(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "llama")
    file = tmp_path / "tokenizer.json"
    change_json(file, post_processor=None)
    assert json.loads(file.read_text())["post_processor"] is None
    with pytest.raises(ValueError, match=r"first id of a prompt: got \d+, expected 1, the token"):
        load_reconstructor(tmp_path)


def test_a_prompt_that_ends_otherwise_than_recorded_is_refused(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2", tokens={"critic_suffix_ids": [1, 2]})
    with pytest.raises(ValueError, match=r"last ids of a prompt: got .*, expected \[1, 2"):
        load_reconstructor(tmp_path)


def test_its_own_error_is_computed_at_its_own_norm(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2", extraction={"mse_scale": "sqrt_d_model"})
    activations = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)) * 9
    loaded, expected = load_reconstructor(tmp_path), expected_of(tmp_path, "qwen2")
    cosine = torch.cosine_similarity(expected, activations.double())
    errors = loaded.errors(TEXTS, activations)
    torch.testing.assert_close(errors.double(), 2 * (1 - cosine), atol=1e-5, rtol=1e-5)
    raw = write_reconstructor(tmp_path / "raw", "qwen2", extraction={"mse_scale": None})
    plain = (expected - activations).square().mean(-1)
    errors = load_reconstructor(raw).errors(TEXTS, activations)
    torch.testing.assert_close(errors.double(), plain, atol=1e-4, rtol=1e-5)


def test_it_is_a_scorer_like_any_other(tmp_path: Path) -> None:
    write_reconstructor(tmp_path, "qwen2")
    right, mean = torch.randn(2, WIDTH), torch.randn(WIDTH) / 20
    scorer = Scorer(load_reconstructor(tmp_path, mean=mean))
    expected = expected_of(tmp_path, "qwen2")
    scores = scorer.score(TEXTS, right, right.flip(0)[:, None])
    cosines = torch.cosine_similarity(expected, right.double())
    torch.testing.assert_close(scores.right.double(), cosines, atol=1e-5, rtol=1e-5)
    centred = [x / x.norm(dim=-1, keepdim=True) - mean for x in (expected, right.double())]
    torch.testing.assert_close(
        scores.centred_right.double(), torch.cosine_similarity(*centred), atol=1e-5, rtol=1e-5
    )
