"""Bases of few bits: refused without their package, read and generated on with it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import MARKER, make_quantised_base, make_tiny_base, random_state

from nla_ray.base.adapters import adapter_state, add_lora
from nla_ray.base.families import quantiser_of
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer
from nla_ray.base.prompts import build_injection_prompt
from nla_ray.base.self_check import check_reading
from nla_ray.description.engines.interface import engine_name, make_engine
from nla_ray.settings.config import BaseConfig, LoraSettings

LORA = LoraSettings(rank=4, alpha=8)
IDS = torch.arange(3, 25).view(2, 11)


def said_to_be_quantised(folder: Path, method: str) -> BaseConfig:
    base = make_tiny_base(folder)
    file = folder / "config.json"
    settings = {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return base


def test_a_method_that_no_adapter_is_trained_on_is_refused_by_name(tmp_path: Path) -> None:
    base = said_to_be_quantised(tmp_path, "gptq")
    with pytest.raises(ValueError, match=r"quantised by .gptq., expected plain ones or those of"):
        load_model_config(base)


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_base_whose_package_is_missing_is_refused_with_the_command(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = said_to_be_quantised(tmp_path, package)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ValueError, match=rf"Install it with: pip install {package}$"):
        load_backbone(base)


@pytest.fixture
def eight_bits(tmp_path: Path) -> BaseConfig:
    """A tiny base whose matrices torchao has rounded to 8 bits."""
    quantisation = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    settings = TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    return make_quantised_base(tmp_path, settings, architecture="llama", width=64, heads=4)


def test_a_base_of_eight_bits_is_read_trained_on_and_generated_on(eight_bits: BaseConfig) -> None:
    config = load_model_config(eight_bits)
    assert (quantiser_of(config), engine_name(config)) == ("torchao", "plain")
    first = load_backbone(eight_bits, num_blocks=2)
    check_reading(first, [1])
    whole = load_backbone(eight_bits)
    torch.testing.assert_close(
        ResidualReader(first, [1]).read(IDS)[1], ResidualReader(whole, [1]).read(IDS)[1]
    )
    model, tokenizer = add_lora(whole, LORA), load_tokenizer(eight_bits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 3 * 7 and all(g.abs().max() > 0 for g in gradients)
    engine = make_engine(model, tokenizer, build_injection_prompt(tokenizer, MARKER), 4.0, 4, LORA)
    activations = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    plain = engine.generate(activations, max_new_tokens=8)
    engine.load_weights(random_state(adapter_state(model)), 1)
    adapted = engine.generate(activations, max_new_tokens=8)
    assert [a.token_ids for a in adapted] != [p.token_ids for p in plain]
