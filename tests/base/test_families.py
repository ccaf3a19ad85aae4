"""The table of architectures, against the models that transformers builds."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, MistralConfig

from nla_ray.base.adapters import add_lora
from nla_ray.base.families import FAMILIES, blocks_of, decoder_of, family_of
from nla_ray.base.load import random_backbone
from nla_ray.settings.config import LoraSettings

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest):
    return random_backbone(AutoConfig.for_model(request.param, **SIZES))


def test_every_part_of_a_family_is_where_the_table_says(model) -> None:
    family, decoder = family_of(model), decoder_of(model)
    assert decoder is model.get_decoder()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert decoder.get_submodule(family.embedding) is model.get_input_embeddings()
    assert decoder.get_submodule(family.final_norm).weight.shape == (32,)
    assert decoder.get_submodule(family.rotary).inv_freq.shape == (8,)
    blocks = blocks_of(model)
    assert len(blocks) == 2
    for name in (family.attention_norm, family.mlp_norm):
        assert blocks[1].get_submodule(name).weight.shape == (32,)


def test_the_seven_projections_are_all_matrices_of_a_block_and_have_the_biases_the_table_says(
    model,
) -> None:
    family, block = family_of(model), blocks_of(model)[0]
    qkv = (family.query, family.key, family.value)
    paths = (*qkv, family.output, family.gate, family.up, family.down)
    matrices = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert matrices == set(paths)
    assert family.projections == tuple(path.split(".")[-1] for path in paths)
    with_bias = {path for path in paths if block.get_submodule(path).bias is not None}
    assert with_bias == (set(qkv) if family.has_qkv_biases else set())


def test_a_model_wrapped_by_adapters_is_of_the_family_of_its_base(model) -> None:
    family, decoder = family_of(model), decoder_of(model)
    with torch.device("meta"):
        wrapped = add_lora(model, LoraSettings(rank=2, alpha=2))
    assert family_of(wrapped) is family and decoder_of(wrapped) is decoder


def test_another_architecture_is_refused_by_name() -> None:
    config = MistralConfig(**SIZES)
    for refused in (config, random_backbone(config)):
        with pytest.raises(
            ValueError, match=r"base.model: got model type 'mistral'.*llama or qwen2"
        ):
            family_of(refused)
