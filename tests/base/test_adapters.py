"""Adapters over a base, against PEFT and safetensors as oracles."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_base, random_state
from torch import Tensor

from nla_ray.base.adapter_files import read_adapter
from nla_ray.base.adapters import (
    adapter_active,
    adapter_settings,
    adapter_state,
    add_lora,
    load_adapter,
    save_adapter,
    set_adapter_state,
)
from nla_ray.base.families import family_of
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone
from nla_ray.settings import precision
from nla_ray.settings.config import BaseConfig, LoraSettings

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture
def ids() -> Tensor:
    """Token ids [3 rows, 11]."""
    return torch.randint(3, 400, (3, 11), generator=torch.Generator().manual_seed(2))


def test_a_fresh_adapter_changes_nothing_and_trains_seven_projections_of_every_block(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    plain = load_backbone(tiny_base)(ids).logits
    model = add_lora(load_backbone(tiny_base), LORA)
    assert torch.equal(model(ids).logits, plain)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3 * 7 * 2
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable} == set(
        family_of(model).projections
    )


def test_an_attached_but_disabled_adapter_leaves_captured_activations_unchanged(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    plain = ResidualReader(load_backbone(tiny_base), [1]).read(ids)[1]
    model = add_lora(load_backbone(tiny_base), LORA)
    set_adapter_state(model, random_state(adapter_state(model)))
    reader = ResidualReader(model, [1])
    with torch.inference_mode():
        with adapter_active(model, None):
            assert torch.equal(reader.read(ids)[1], plain)
        assert not torch.allclose(reader.read(ids)[1], plain, atol=1e-2), (
            "the adapter has no influence; the test shows nothing"
        )


def test_a_saved_adapter_holds_only_lora_tensors_and_loads_under_another_name(
    tiny_base: BaseConfig, ids: Tensor, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA, "first")
    set_adapter_state(model, random_state(adapter_state(model, "first")), "first")
    save_adapter(model, tmp_path, "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(adapter_state(model, "first"))
    assert "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight" in saved
    state, settings = read_adapter(tmp_path)
    assert settings == LORA == adapter_settings(model, "first")
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    loaded = load_adapter(load_backbone(tiny_base), tmp_path, "second")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]


def test_a_saved_adapter_is_the_same_file_whatever_process_wrote_it(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA)
    save_adapter(model, tmp_path)
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(family_of(model).projections)


def test_two_adapters_share_one_base_and_switching_restores_what_was_trainable(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA, "second")
    set_adapter_state(model, random_state(adapter_state(model, "second"), seed=1), "second")
    second = model(ids).logits
    model = add_lora(model, LORA, "first")
    set_adapter_state(model, random_state(adapter_state(model, "first")), "first")
    first = model(ids).logits
    with adapter_active(model, "second"):
        assert torch.equal(model(ids).logits, second)
    assert torch.equal(model(ids).logits, first)
    assert {
        name.split(".")[-2]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    } == {"first"}


def test_adapter_weights_are_float32_over_a_bfloat16_base(
    tiny_base: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_bf16\n")  # else the base is widened
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    model = add_lora(load_backbone(dataclasses.replace(tiny_base, dtype="bfloat16")), LORA)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {
        torch.float32
    }
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_weights_of_another_rank_are_refused(tiny_base: BaseConfig) -> None:
    model = add_lora(load_backbone(tiny_base), LORA)
    wrong = {
        name: value[:2] if "lora_A" in name else value[:, :2]
        for name, value in adapter_state(model).items()
    }
    with pytest.raises(ValueError, match="42 tensors that do not fit"):
        set_adapter_state(model, wrong)


def test_a_folder_without_adapter_and_an_adapter_of_another_base_are_refused(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"without adapter_config.json"):
        load_adapter(load_backbone(tiny_base), tmp_path)
    wide = make_tiny_base(tmp_path / "wide", heads=4, key_value_heads=4)
    save_adapter(add_lora(load_backbone(wide), LORA), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"tensors that do not fit.*another base or rank"):
        load_adapter(load_backbone(tiny_base), tmp_path / "adapter")
