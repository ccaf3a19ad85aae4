"""A text model that a checkpoint holds beside a model of images: read as one that stands alone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import MARKER, build_tokenizer, random_state, tiny_config
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from nla_ray.activation.injection import activations_attached
from nla_ray.base.adapter_files import read_adapter
from nla_ray.base.adapters import (
    adapter_state,
    add_lora,
    load_adapter,
    merged_adapter,
    save_adapter,
    set_adapter_state,
)
from nla_ray.base.config_files import as_config
from nla_ray.base.families import family_of
from nla_ray.base.identity import base_info
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer
from nla_ray.base.prompts import build_injection_prompt
from nla_ray.base.self_check import check_reading
from nla_ray.bench.families import small_sizes, write_model
from nla_ray.description.engines.interface import engine_name, make_engine
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.plan.sizes import sizes_in
from nla_ray.plan.text import describe_plan
from nla_ray.settings.config import BaseConfig, LoraSettings
from nla_ray.settings.presets import nano

BLOCKS, WIDTH = 4, 32
IDS = torch.arange(3, 25).view(2, 11)
LORA = LoraSettings(rank=4, alpha=8)
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    """A random Gemma 3 that reads images, with a tokenizer."""
    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("gemma3")
    size = len(tokenizer) + 16
    text = {
        "model_type": "gemma3_text",
        "vocab_size": size,
        "max_position_embeddings": 512,
        "sliding_window": 256,
        "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **small_sizes("gemma3_text", BLOCKS, WIDTH, 4, 2),
    }
    images = {"image_token_index": size - 1, "boi_token_index": size - 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        eoi_token_index=size - 3,
        **images,
    )
    torch.manual_seed(0)
    write_model(folder, Gemma3ForConditionalGeneration(config), tokenizer)
    return tiny_config(folder)


def whole_model(base: BaseConfig) -> Any:
    """What transformers makes of the folder."""
    return AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.float32).eval()


def test_its_configuration_is_that_of_the_text_model(base: BaseConfig, tmp_path: Path) -> None:
    values = json.loads((Path(base.model) / "config.json").read_text())
    assert values["model_type"] == "gemma3"
    config, known = load_model_config(base), as_config(values)
    for found in (config, known):
        assert found.model_type == "gemma3_text" and found.wrapped_in == "gemma3"
    assert sizes_in(config) == sizes_in(known)
    model = load_backbone(base)
    assert sizes_in(known).parameters == sum(p.numel() for p in model.parameters())
    assert base_info(base).model_type == "gemma3_text"
    run = dataclasses.replace(nano(), base=base, run_dir=str(tmp_path))
    assert f"{BLOCKS} blocks, d_model {WIDTH}" in describe_plan(run, "pipeline")


def test_a_file_that_says_little_of_it_is_filled_in_as_transformers_does() -> None:
    ours = as_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560}})
    theirs = Gemma3Config(text_config={"hidden_size": 2560}).get_text_config()
    assert sizes_in(ours) == sizes_in(theirs)


def test_its_layers_are_the_hidden_states_of_the_whole_model(base: BaseConfig) -> None:
    whole = whole_model(base)
    assert type(whole) is Gemma3ForConditionalGeneration
    with torch.no_grad():
        expected = whole(input_ids=IDS, output_hidden_states=True)
    model = load_backbone(base)
    torch.testing.assert_close(model(IDS).logits, expected.logits)
    streams = ResidualReader(model, [0, 1, 2]).read(IDS)
    for layer in (0, 1, 2):
        torch.testing.assert_close(streams[layer], expected.hidden_states[layer + 1])
    first = load_backbone(base, num_blocks=2)
    check_reading(first, [0, 1])
    torch.testing.assert_close(ResidualReader(first, [1]).read(IDS)[1], streams[1])


def test_files_of_either_naming_are_read(base: BaseConfig, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(base.model, folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    assert "language_model.model.norm.weight" in state
    renamed = {}
    for name, value in state.items():
        inner = name.replace("language_model.model.", "model.language_model.")
        renamed[inner if inner != name else f"model.{name}"] = value
    save_file(renamed, file, metadata={"format": "pt"})
    other = load_backbone(dataclasses.replace(base, model=str(folder)))
    torch.testing.assert_close(other(IDS).logits, load_backbone(base)(IDS).logits)


def test_the_engine_writes_what_the_librarys_generate_writes(base: BaseConfig) -> None:
    model, tokenizer = add_lora(load_backbone(base), LORA), load_tokenizer(base)
    assert engine_name(load_model_config(base)) == "plain"
    prompt = build_injection_prompt(tokenizer, MARKER)
    activations = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    engine = make_engine(model, tokenizer, prompt, base.injection_norm, 4, LORA)
    written = engine.generate(activations, max_new_tokens=12)
    with activations_attached(model.get_base_model(), activations, base.injection_norm) as wrapper:
        ids = torch.tensor([prompt.encode(row, wrapper.vocab_size) for row in range(3)])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
    for description, row in zip(written, expected[:, ids.shape[1] :].tolist(), strict=True):
        assert description.token_ids == row[: len(description.token_ids)]
    engine.load_weights(random_state(adapter_state(model)), 1)
    adapted = engine.generate(activations, max_new_tokens=12)
    assert [a.token_ids for a in adapted] != [w.token_ids for w in written]


def test_a_saved_verbalizer_describes_as_its_model_does(base: BaseConfig, tmp_path: Path) -> None:
    model, tokenizer = add_lora(load_backbone(base), LORA), load_tokenizer(base)
    state = random_state(adapter_state(model))
    set_adapter_state(model, state)
    save_adapter(model, tmp_path)
    activations = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    prompt = build_injection_prompt(tokenizer, MARKER)
    engine = make_engine(model, tokenizer, prompt, base.injection_norm, 4, LORA)
    engine.load_weights(state, 0)
    written = engine.generate(activations, max_new_tokens=12)
    found = Verbalizer.load(base, tmp_path).describe(activations, max_new_tokens=12)
    assert [f.token_ids for f in found] == [w.token_ids for w in written]


@pytest.mark.parametrize("num_blocks", [None, 2])
def test_its_adapter_loads_in_peft_around_the_whole_model(
    base: BaseConfig, num_blocks: int | None, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(base), LORA, num_blocks=num_blocks)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    save_adapter(model, tmp_path)
    expected = model.eval()(input_ids=IDS).logits
    plain = load_backbone(base)(IDS).logits
    assert (expected - plain).abs().max() > 1e-2
    by_peft = PeftModel.from_pretrained(whole_model(base), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(by_peft(input_ids=IDS).logits, expected)
    adapted = {name for name, _ in by_peft.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * 7 * (num_blocks or BLOCKS)
    assert all("language_model" in name for name in adapted), "images are left alone"
    # And here, with the names of a text model that stands alone.
    again = load_adapter(load_backbone(base), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)
    state, settings = read_adapter(tmp_path, is_wrapped=True)
    assert state.keys() == adapter_state(model).keys() and settings == LORA
    assert family_of(again) is family_of(model)
    first = load_adapter(load_backbone(base, num_blocks=2), tmp_path)
    found, whole = (ResidualReader(m, [1]).read(IDS)[1] for m in (first, model))
    torch.testing.assert_close(found, whole)


def test_with_an_adapter_merged_it_is_saved_as_a_text_model_that_stands_alone(
    base: BaseConfig, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(base), LORA)
    set_adapter_state(model, random_state(adapter_state(model)))
    save_adapter(model, tmp_path / "adapter")
    merged_adapter(load_backbone(base), tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    saved, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    torch.testing.assert_close(saved.eval()(IDS).logits, model.eval()(IDS).logits)


def test_what_is_not_read_is_refused(base: BaseConfig) -> None:
    packed = {"model_type": "gemma3", "text_config": {}, "quantization_config": {}}
    with pytest.raises(ValueError, match=r"quantised weights of model type 'gemma3', expected"):
        as_config(packed)
    with pytest.raises(ValueError, match=r"got 'vllm' for the text model in a 'gemma3', expected"):
        engine_name(load_model_config(base), "vllm")
    with pytest.raises(ValueError, match=r"got model type 'mistral3', expected .*gpt2, gemma3"):
        family_of(as_config({"model_type": "mistral3"}))
