"""The sizes of a base, and the weights, adapters and caches that follow from them.

Sizes come from a table or from a config.json; no weight is read. It knows no stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nla_ray.base.config_files import known_config
from nla_ray.base.families import FAMILIES, Family, check_context, decoder_shape, family_of
from nla_ray.plan.quantised import Quantisation, quantisation_of
from nla_ray.settings.config import LoraSettings, PretrainConfig, PretrainRunConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """Sizes of a decoder: d_model, attention, feed-forward layer, and what its family adds."""

    d_model: int
    """Width of the residual stream."""
    ffn: int
    """Width of the feed-forward layer; of an expert where there are several."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether the output matrix is the embedding's."""
    family: Family
    biases: Literal["none", "qkv", "attention", "all"]
    """As `Family` has it, after what the configuration says."""
    positions: int = 0
    """Rows of a table of positions."""
    experts: int = 0
    """Experts of a block, each a feed-forward layer; 0: a block has one layer, without a router."""
    active_experts: int = 0
    """Experts that compute a token."""
    dense_layers: int = 0
    """Blocks without experts in a base of experts."""
    dense_ffn: int = 0
    """Width of their feed-forward layer."""
    quantisation: Quantisation | None = None
    """How matrices are packed; None: weights are plain numbers."""

    @property
    def query_width(self) -> int:
        """Numbers in a token's queries; it need not be d_model."""
        return self.head_dim * self.num_heads

    @property
    def key_value_width(self) -> int:
        """Numbers in a token's key, and as many in its value."""
        return self.head_dim * self.num_kv_heads

    @property
    def active_ffn(self) -> int:
        """Width of all feed-forward layers that compute a token of a block."""
        return self.ffn * max(1, self.active_experts)

    @property
    def _attention_parameters(self) -> int:
        """Weights of attention and of all norms of a block."""
        matrices = 2 * self.d_model * (self.query_width + self.key_value_width)
        biases = {
            "none": 0,
            "qkv": self.query_width + 2 * self.key_value_width,
            "attention": self.query_width + 2 * self.key_value_width + self.d_model,
            "all": self.query_width + 2 * self.key_value_width + self.d_model,
        }[self.biases]
        norms = {
            "none": 0,
            "head": 2 * self.head_dim,
            "width": self.query_width + self.key_value_width,
        }[self.family.head_norms]
        return matrices + biases + norms + self.family.block_norms * self.d_model

    def _mlp_parameters(self, width: int) -> int:
        biases = width + self.d_model if self.biases == "all" else 0
        return self.family.mlp_matrices * self.d_model * width + biases

    def _block_parameters(self, experts: int) -> float:
        """Weights of a block, or the mean where some blocks have no experts."""
        if not self.experts:
            return self._attention_parameters + self._mlp_parameters(self.ffn)
        router = self.experts * self.d_model
        with_experts = router + experts * self._mlp_parameters(self.ffn)
        dense = self._mlp_parameters(self.dense_ffn)
        share = self.dense_layers / self.num_layers
        return self._attention_parameters + (1 - share) * with_experts + share * dense

    @property
    def block_parameters(self) -> float:
        """Weights of a block; of several kinds of blocks the mean."""
        return self._block_parameters(self.experts)

    @property
    def active_block_parameters(self) -> float:
        """Weights of a block that compute a token: of experts those that are chosen for it."""
        return self._block_parameters(self.active_experts)

    @property
    def _table_parameters(self) -> int:
        """Embedding, output matrix, positions and final norm."""
        tables = (1 if self.tied else 2) * self.vocab + self.positions
        return (tables + self.family.final_norms) * self.d_model

    @property
    def parameters(self) -> int:
        """All weights: blocks, final norm, embedding and output matrix."""
        return round(self.num_layers * self.block_parameters) + self._table_parameters

    @property
    def active_parameters(self) -> int:
        """All weights that compute a token."""
        return round(self.num_layers * self.active_block_parameters) + self._table_parameters

    def parameters_up_to(self, layer: int) -> int:
        """Embedding and blocks 0..layer: what capture and reconstructors load."""
        tables = (self.vocab + self.positions) * self.d_model
        return round((layer + 1) * self.block_parameters) + tables

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """[out, in] of the matrices of a block that get adapters, in the order of `Family.paths`.

        Some families hold several as one.
        """
        width, inner, keys = self.d_model, self.query_width, self.key_value_width
        output, down = (width, inner), (width, self.ffn)
        if len(self.family.paths) == 4 and not self.experts:
            ups = (self.family.mlp_matrices - 1) * self.ffn
            return [(inner + 2 * keys, width), output, (ups, width), down]
        attention = [(inner, width), (keys, width), (keys, width), output]
        return attention if self.experts else [*attention, *2 * [(self.ffn, width)], down]

    def lora_parameters(self, lora: LoraSettings, num_layers: int) -> int:
        """rank x (in + out) of the matrices of a block that get adapters, in `num_layers` blocks.

        Matrices that a family holds as one get one adapter.
        """
        return num_layers * lora.rank * sum(map(sum, self._matrices))

    def weights_bytes(self, item_bytes: int, layer: int | None = None) -> float:
        """The base's weights; of blocks 0..layer and the embedding where `layer` is given.

        `item_bytes`: of a plain weight. Packed matrices count as they lie in memory.
        """
        blocks = self.num_layers if layer is None else layer + 1
        plain = self.parameters if layer is None else self.parameters_up_to(layer)
        packed, quantisation = 0.0, self.quantisation
        if quantisation is not None:
            shapes = blocks * self._matrices
            matrices = dict(zip(self.family.matrices(blocks), shapes, strict=True))
            names = [name for name in matrices if quantisation.packs(name)]
            head = self.family.head
            if layer is None and not self.tied and quantisation.packs(head, is_head=True):
                matrices[head] = self.vocab, self.d_model
                names.append(head)
            packed = sum(quantisation.matrix_bytes(*matrices[name]) for name in names)
            plain -= sum(rows * columns for rows, columns in map(matrices.__getitem__, names))
        return plain * item_bytes + packed

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
        check_context(known, config.base.max_tokens)
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
        family=FAMILIES["qwen2"],
        biases=FAMILIES["qwen2"].biases,
    )


def sizes_in(config: Any) -> BaseSizes:
    """The sizes that a base's configuration names: transformers' own or that of `known_config`.

    Raises ValueError for a base without a row in the table of families.
    """
    family, shape = family_of(config), decoder_shape(config)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # GPT-2 names none
    experts = getattr(config, "num_experts", 0)
    step = getattr(config, "decoder_sparse_step", 1)
    listed = getattr(config, "mlp_only_layers", ())
    dense = [layer for layer in range(shape.layers) if layer in listed or (layer + 1) % step]
    return BaseSizes(
        d_model=config.hidden_size,
        ffn=(experts and getattr(config, "moe_intermediate_size", 0)) or width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.groups,
        head_dim=shape.head_dim,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        family=family,
        biases=_biases(config, family),
        positions=config.max_position_embeddings if family.positions else 0,
        experts=experts,
        active_experts=config.num_experts_per_tok if experts else 0,
        dense_layers=len(dense) if experts else 0,
        dense_ffn=width,
        quantisation=quantisation_of(config),
    )


def _biases(config: Any, family: Family) -> Literal["none", "qkv", "attention", "all"]:
    """A configuration may give attention biases, or, of GPT-NeoX, take them away (not counted)."""
    asked = getattr(config, "attention_bias", False)
    return "attention" if asked and family.biases == "none" else family.biases
