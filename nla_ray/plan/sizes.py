"""The sizes of a base, and the weights, adapters and caches that follow from them.

Sizes come from a table or from a config.json; no weight is read. It knows no stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from nla_ray.base.config_files import known_config
from nla_ray.base.families import FAMILIES, decoder_shape
from nla_ray.settings.config import LoraSettings, PretrainConfig, PretrainRunConfig, RunConfig


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
    head_dim: int
    vocab: int
    tied: bool
    """Whether the output matrix is the embedding's."""
    has_qkv_biases: bool
    """Whether queries, keys and values have biases."""

    @property
    def query_width(self) -> int:
        """Numbers in a token's queries; it need not be d_model."""
        return self.head_dim * self.num_heads

    @property
    def key_value_width(self) -> int:
        """Numbers in a token's key, and as many in its value."""
        return self.head_dim * self.num_kv_heads

    @property
    def block_parameters(self) -> int:
        """Weights of a block: query and output, key and value, gate, up and down, two norms."""
        attention = 2 * self.d_model * (self.query_width + self.key_value_width)
        biases = self.query_width + 2 * self.key_value_width if self.has_qkv_biases else 0
        return attention + biases + 3 * self.d_model * self.ffn + 2 * self.d_model

    @property
    def parameters(self) -> int:
        """All weights: blocks, final norm, embedding and output matrix."""
        tables = 1 if self.tied else 2
        blocks = self.num_layers * self.block_parameters
        return blocks + self.d_model + self.vocab * self.d_model * tables

    def parameters_up_to(self, layer: int) -> int:
        """Embedding and blocks 0..layer: what capture and reconstructors load."""
        return (layer + 1) * self.block_parameters + self.vocab * self.d_model

    def lora_parameters(self, lora: LoraSettings, num_layers: int) -> int:
        """rank x (in + out) of the seven projections, in `num_layers` blocks."""
        query_and_output = 2 * (self.d_model + self.query_width)
        key_and_value = 2 * (self.d_model + self.key_value_width)
        feed_forward = 3 * (self.d_model + self.ffn)
        return num_layers * lora.rank * (query_and_output + key_and_value + feed_forward)

    def kv_bytes(self, tokens: int, item_bytes: int) -> int:
        """Key and value cache of `tokens` tokens."""
        return 2 * self.num_layers * tokens * self.key_value_width * item_bytes


def base_sizes(config: RunConfig) -> BaseSizes:
    """Sizes of a run's base: from the table of published ones, its folder, or the hub cache.

    An embedded base that was not trained yet has those it would be trained with. Raises ValueError
    when they cannot be known, and for a base that no job takes, as the job does.
    """
    known = known_config(config.base.model)
    if known is not None:
        decoder_shape(known)
        return sizes_in(known)
    if config.base.model.startswith("embedded:"):
        return pretrained_sizes(pretrain_section(config))
    raise ValueError(
        f"plan for base {config.base.model!r}: got no config.json in a folder or in the local hub"
        " cache, expected one. Download the model first, or plan with one of the presets' bases."
    )


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
        head_dim=pretrain.d_model // pretrain.num_heads,
        vocab=pretrain.vocab_size,
        tied=True,
        has_qkv_biases=True,  # it is a Qwen2
    )


def sizes_in(config: SimpleNamespace) -> BaseSizes:
    """The sizes that a base's configuration names, whether a job takes the base or not."""
    family = FAMILIES.get(config.model_type)
    head_dim = getattr(config, "head_dim", None)
    return BaseSizes(
        d_model=config.hidden_size,
        ffn=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        has_qkv_biases=family is not None and family.has_qkv_biases,
    )
