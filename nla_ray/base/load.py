"""The frozen base model: what it is, how it is loaded, and what "layer K" means when it is run.

Knows transformers; knows nothing of adapters' training, of prompts or of Ray. Protects two rules:
layer K is the output of block K (never the final norm's), and nothing above the wanted blocks is
loaded or run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nla_ray.base.families import family_of
from nla_ray.base.layers import check_layer, keep_blocks
from nla_ray.base.sources import base_folder, quiet_loading
from nla_ray.settings.config import BaseConfig

PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    }
}
"""Shapes of hub models that presets name, so that a plan needs no network. Source: the models' own
config.json."""


# what a base is -----------------------------------------------------------------------------------


def load_model_config(base: BaseConfig):
    """The base's transformers configuration: from its folder or hub, else from PUBLISHED_CONFIGS.
    No weights are read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base_folder(base.model, weights=False))
    except ValueError:
        if base.model not in PUBLISHED_CONFIGS:
            raise
        return AutoConfig.for_model(**PUBLISHED_CONFIGS[base.model])


def load_tokenizer(base: BaseConfig):
    """The base's tokenizer; padding goes to the right and never needs a new token."""
    from transformers import AutoTokenizer

    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(base_folder(base.model, weights=False))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"base.model {base.model!r}: got a tokenizer without chat template, expected a chat"
            " model. Name an instruction-tuned model."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# loading ------------------------------------------------------------------------------------------


def torch_device(base: BaseConfig) -> torch.device:
    """The device a base is loaded on: `auto` is CUDA when there is one."""
    if base.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if base.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "base.device: got 'cuda', expected a device that this process has. Set --base.device"
            " auto."
        )
    return torch.device(base.device)


def computes_in_bf16(base: BaseConfig) -> bool:
    """Whether matrix products of training, and of reading descriptions with what was trained, run
    in bfloat16: as configured, or where the processor has instructions for it."""
    if base.training_dtype != "auto":
        return base.training_dtype == "bfloat16"
    if base.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_backbone(base: BaseConfig, *, num_blocks: int | None = None, attention: str | None = None):
    """The base as a frozen causal language model in eval mode, in its configured type and on its
    device.

    With `num_blocks` only the first blocks are read from disk, and neither final norm nor output
    head: such a model has the causal model's parameter names (so adapters fit both) but yields the
    residual stream, to be read with `ResidualReader`.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    folder, options = (
        base_folder(base.model),
        {"dtype": getattr(torch, base.dtype), "attn_implementation": attention},
    )
    config = load_model_config(base)
    with quiet_loading():
        if num_blocks is None:
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        else:
            check_layer(num_blocks - 1, config.num_hidden_layers)
            config = keep_blocks(config, num_blocks)
            decoder = AutoModel.from_pretrained(folder, config=config, **options)
            model = _headless(config, decoder)
    return model.to(torch_device(base)).eval().requires_grad_(False)


def _headless(config, decoder: nn.Module):
    """A causal model around `decoder` with no final norm and no output head."""
    from transformers import AutoModelForCausalLM

    config.tie_word_embeddings = False
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    family = family_of(config)
    shell.set_submodule(family.decoder, decoder)
    shell.set_submodule(family.head, nn.Identity())
    decoder.set_submodule(family.final_norm, nn.Identity())
    return shell


def random_backbone(
    config, *, device: str = "meta", dtype: torch.dtype = torch.float32, seed: int = 0
):
    """A causal model of this shape without trained weights: on `meta`, without any; for checks of
    shapes and memory."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
