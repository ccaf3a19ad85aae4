"""The table of architectures, against the models that transformers builds."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, GPT2Config, MistralConfig

from nla_ray.base.adapters import add_lora
from nla_ray.base.families import FAMILIES, blocks_of, decoder_of, family_of
from nla_ray.base.layers import ResidualReader
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


IDS = torch.arange(3, 25).view(2, 11)
GPT2_ROW = dataclasses.replace(
    FAMILIES["llama"], decoder="transformer", embedding="wte", blocks="h", final_norm="ln_f"
)


def outputs_of_blocks(model: nn.Module) -> list[Tensor]:
    """What every block gives, by hooks on the whole model: [batch, seq, d_model] each."""
    outputs: list[Tensor] = []
    for block in blocks_of(model):
        block.register_forward_hook(
            lambda module, inputs, output: outputs.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    model(IDS)
    return outputs


def unlike_ones(model: nn.Module) -> nn.Module:
    """The model with other norms than it starts with, so that a norm left in shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("model_type", [*FAMILIES, "gpt2"])
def test_a_layer_is_the_output_of_its_block_the_last_one_too_whatever_the_final_norm_is_called(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", GPT2_ROW)
    model = unlike_ones(random_backbone(AutoConfig.for_model(model_type, **SIZES), device="cpu"))
    expected = outputs_of_blocks(model)
    streams = ResidualReader(model, [0, 1]).read(IDS)
    torch.testing.assert_close(streams[0], expected[0])
    torch.testing.assert_close(streams[1], expected[1])
    normed = model(IDS, output_hidden_states=True).hidden_states[2]
    assert (streams[1] - normed).abs().max() > 0.1, "the last block's output is a normed one"


def test_a_row_that_names_no_norm_of_the_model_is_an_error_and_not_a_normed_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", dataclasses.replace(GPT2_ROW, final_norm="norm"))
    with pytest.raises(AttributeError, match="norm"):
        ResidualReader(random_backbone(GPT2Config(**SIZES), device="cpu"), [1])


def test_a_model_without_a_row_is_read_by_nobody() -> None:
    with pytest.raises(ValueError, match=r"base.model: got model type 'gpt2', expected"):
        ResidualReader(random_backbone(GPT2Config(**SIZES)), [1])
