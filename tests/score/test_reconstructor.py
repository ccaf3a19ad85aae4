"""Reconstructor and scorer: formulas by hand, and against the whole model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_state

from nla_ray.activation import vectors
from nla_ray.base.adapters import adapter_state, add_lora, set_adapter_state
from nla_ray.base.load import load_backbone
from nla_ray.score.packing import share_beginnings
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.scorer import Scorer, compare
from nla_ray.settings.config import BaseConfig, LoraSettings

LORA = LoraSettings(rank=4, alpha=8)
DESCRIPTIONS = [
    "- a test of code",
    "- a licence that permits copying, with conditions\n- tokens: the",
    "x",
    "- a test of code",
]


@pytest.fixture
def reconstructor(tiny_base: BaseConfig) -> Reconstructor:
    """A reconstructor with random adapter and head: every part has an influence."""
    mean = torch.linspace(-0.2, 0.2, 32)
    built = Reconstructor.build(tiny_base, LORA, mean, max_tokens=24)
    set_adapter_state(built.model, random_state(adapter_state(built.model)))
    torch.nn.init.normal_(built.head.weight, std=0.05, generator=torch.Generator().manual_seed(4))
    return built.eval()


def test_a_reconstruction_is_the_mean_plus_the_heads_view_of_the_marker(
    reconstructor: Reconstructor, tiny_base: BaseConfig
) -> None:
    encoded = reconstructor.encode(DESCRIPTIONS)
    whole = add_lora(load_backbone(tiny_base), LORA)
    state = adapter_state(whole)
    set_adapter_state(whole, {**state, **adapter_state(reconstructor.model)})
    for ids, actual in zip(encoded, reconstructor.reconstruct(DESCRIPTIONS, 3), strict=True):
        stream = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[
            tiny_base.layer + 1
        ][0, -1]
        scaled = stream / stream.square().sum().sqrt() * 32**0.5
        torch.testing.assert_close(
            actual, reconstructor.mean + reconstructor.head.weight @ scaled, atol=1e-5, rtol=1e-5
        )


def test_a_control_token_in_a_description_is_read_as_characters(
    reconstructor: Reconstructor,
) -> None:
    tokenizer, description = reconstructor.tokenizer, "- a<|im_end|>\n- b"
    [ids] = reconstructor.encode([description])
    assert tokenizer.decode(ids) == f"{description}\nActivation: {reconstructor.marker}"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    reconstructor.max_tokens = 8
    [cut] = reconstructor.encode([description])
    whole = tokenizer(description, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(cut).startswith(tokenizer.decode(whole[:8]))


def test_training_starts_from_the_mean_and_moves_only_adapter_and_head(
    tiny_base: BaseConfig,
) -> None:
    mean = torch.linspace(-0.2, 0.2, 32)
    built = Reconstructor.build(tiny_base, LORA, mean)
    torch.testing.assert_close(built.reconstruct(["- a test"])[0], mean)
    trainable = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name == "head.weight" for name in trainable)
    assert len(trainable) == 2 * 7 * 2 + 1


def test_reconstructions_do_not_depend_on_batches_and_repeats(reconstructor: Reconstructor) -> None:
    together = reconstructor.reconstruct(DESCRIPTIONS, 4)
    alone = torch.cat([reconstructor.reconstruct([text], 1) for text in DESCRIPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.equal(together[0], together[3])


@pytest.mark.parametrize("in_bf16", [False, True])
def test_beginnings_read_with_their_whole_are_what_they_are_alone(
    reconstructor: Reconstructor, in_bf16: bool
) -> None:
    reconstructor.in_bf16, reconstructor.max_tokens = in_bf16, 64
    whole = (
        "- a licence that permits copying\n- tokens: the, and, of, copy, permit\n- next: conditions"
        " follow"
    )
    texts = [whole, *("\n".join(whole.splitlines()[:count]) for count in (1, 2)), "x", whole[:40]]
    assert any(row.ends for row in share_beginnings(reconstructor.encode(texts)))
    with torch.no_grad():
        alone = torch.cat(
            [reconstructor(*reconstructor.collate(reconstructor.encode([text]))) for text in texts]
        )
    torch.testing.assert_close(
        reconstructor.reconstruct(texts, 4), alone, atol=5e-2 if in_bf16 else 1e-5, rtol=0
    )


def test_a_long_description_is_cut_at_its_end_and_the_marker_stays(
    reconstructor: Reconstructor, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "- " + "tests and tokens " * 50
    for limit in (1, 5, 24):
        monkeypatch.setattr(reconstructor, "max_tokens", limit)
        ids = reconstructor.encode([long])[0]
        assert ids[-1] == reconstructor.marker_id
        assert len(ids) <= limit + len(reconstructor.encode([""])[0]) + 1
    start = reconstructor.tokenizer.encode(long)[:10]
    assert reconstructor.encode([long])[0][:10] == start


def test_cutting_inside_a_character_leaves_no_broken_character(
    reconstructor: Reconstructor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstructor, "max_tokens", 10)
    ids = reconstructor.encode(["\u4e2d" * 30])[0]  # three tokens a character
    assert "\ufffd" not in reconstructor.tokenizer.decode(ids)


def test_a_saved_reconstructor_loads_alone_or_into_a_shared_base(
    reconstructor: Reconstructor, tiny_base: BaseConfig, tmp_path: Path
) -> None:
    expected = reconstructor.reconstruct(DESCRIPTIONS)
    reconstructor.save(tmp_path)
    assert set(load_file(tmp_path / "head.safetensors")) == {"weight", "mean"}
    for copy in range(8):
        reconstructor.save(tmp_path / f"copy{copy}")
    assert (
        len({(tmp_path / f"copy{copy}" / "head.safetensors").read_bytes() for copy in range(8)})
        == 1
    )
    alone = Reconstructor.load(tiny_base, tmp_path, adapter="reward")
    shared = Reconstructor.load(tiny_base, tmp_path, adapter="judge", model=alone.model)
    in_whole = Reconstructor.load(
        tiny_base, tmp_path, adapter="reward", model=load_backbone(tiny_base)
    )
    for loaded in (alone, shared, in_whole, alone):
        assert loaded.max_tokens == 24
        torch.testing.assert_close(loaded.reconstruct(DESCRIPTIONS), expected)
    assert shared.model is alone.model


def test_a_reconstructor_of_another_layer_or_width_or_with_a_broken_head_is_refused(
    reconstructor: Reconstructor, tiny_base: BaseConfig, tmp_path: Path
) -> None:
    reconstructor.save(tmp_path)
    with pytest.raises(ValueError, match=r"got layer 1, expected base.layer 0"):
        Reconstructor.load(dataclasses.replace(tiny_base, layer=0), tmp_path)
    with pytest.raises(ValueError, match="mean direction"):
        Reconstructor.build(tiny_base, LORA, torch.zeros(16))
    reconstructor.head.weight.data[0, 0] = torch.nan
    reconstructor.save(tmp_path)
    with pytest.raises(ValueError, match="non-finite"):
        Reconstructor.load(tiny_base, tmp_path)


def test_scores_of_a_hand_computed_case() -> None:
    scores = compare(
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[4.0, 3.0]]),
        torch.tensor([[[1.0, 0.0], [0.0, -2.0]]]),
        torch.tensor([0.5, 0.5]),
    )
    torch.testing.assert_close(scores.right, torch.tensor([0.96]))
    torch.testing.assert_close(scores.wrong, torch.tensor([[0.6, -0.8]]))
    # centred: r (0.1, 0.3), right (0.3, 0.1), wrong (0.5, -0.5) and (-0.5, -1.5)
    torch.testing.assert_close(scores.centred_right, torch.tensor([0.6]))
    torch.testing.assert_close(
        scores.centred_wrong, torch.tensor([[-0.1 / (0.1 * 0.5) ** 0.5, -1.0]])
    )


def test_a_description_is_reconstructed_once_however_many_activations_it_meets(
    reconstructor: Reconstructor,
) -> None:
    rows = []
    reconstructor.head.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    right, wrong = torch.randn(4, 32), torch.randn(4, 6, 32)
    scores = Scorer(reconstructor, batch_size=2).score(DESCRIPTIONS, right, wrong)
    assert sum(rows) == len(set(DESCRIPTIONS))
    reconstruction = reconstructor.reconstruct(DESCRIPTIONS)
    torch.testing.assert_close(scores.wrong[:, 5], vectors.cosine(reconstruction, wrong[:, 5]))
    torch.testing.assert_close(
        scores.centred_right, vectors.centred_cosine(reconstruction, right, reconstructor.mean)
    )


def test_scores_need_one_right_and_k_wrong_activations_per_description(
    reconstructor: Reconstructor,
) -> None:
    with pytest.raises(ValueError, match="one right row and k wrong rows"):
        Scorer(reconstructor).score(DESCRIPTIONS, torch.randn(3, 32), torch.randn(4, 2, 32))
    assert Scorer(reconstructor).score(
        DESCRIPTIONS, torch.randn(4, 32), torch.empty(4, 0, 32)
    ).wrong.shape == (4, 0)
