"""A base's configuration read without torch, against transformers' own classes."""

import pytest
from transformers import AutoConfig

from nla_ray.base.config_files import PUBLISHED_CONFIGS, as_config, known_config
from nla_ray.base.families import DecoderShape, decoder_shape

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16}
CASES = {
    "llama": {"model_type": "llama"},
    "llama without key-value heads": {"model_type": "llama", "num_key_value_heads": None},
    "llama with wide heads": {"model_type": "llama", "head_dim": 32, "rms_norm_eps": 1e-5},
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "llama with windows, which it ignores": {"model_type": "llama", **WINDOWS},
    "llama, old name of a rotary type": {
        "model_type": "llama",
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama, new name of a rotary type": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2, gelu": {"model_type": "qwen2", "hidden_act": "gelu"},
    "qwen2 with windows above its blocks": {"model_type": "qwen2", **WINDOWS},
    "qwen2 with windows": {"model_type": "qwen2", "max_window_layers": 2, **WINDOWS},
    "qwen2 with listed windows": {
        "model_type": "qwen2",
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    **{name: values for name, values in PUBLISHED_CONFIGS.items() if "/" in name},
}


def answer(config) -> DecoderShape | str:
    """The shape, or the sentence that refuses it."""
    try:
        return decoder_shape(config)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_the_class_of_transformers_makes_of_it(name: str) -> None:
    values = {**SMALL, **CASES[name]}
    theirs = AutoConfig.for_model(**{"rope_theta": 1e4, **values})
    assert answer(as_config(values)) == answer(theirs)
    assert as_config(values).tie_word_embeddings == theirs.tie_word_embeddings


def test_a_base_that_is_nowhere_on_this_machine_is_not_known() -> None:
    assert known_config("nobody/knows") is None
    assert known_config("./nowhere") is None
    assert known_config("../nowhere") is None
    assert known_config("embedded:nothing") is None
    assert known_config("embedded:nano").hidden_size == 256
