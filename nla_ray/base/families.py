"""THE table of architectures: where a transformers causal model of each keeps its parts.

Adding an architecture is one row of FAMILIES. Whoever needs a part asks the table, never a guessed
attribute. Protects the rule that a base whose blocks are not understood is refused by name before
anything is made from it, in the same words by a plan and by a job. It imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: names of the parts of an architecture; dotted where a part is inside another one.

    A block of a family adds attention, then a gated MLP, to the residual stream, each after its own
    RMSNorm; positions are rotary.
    """

    decoder: str
    """In the causal model: everything but the output head."""
    head: str
    """In the causal model: the output head."""
    embedding: str
    """In the decoder, as the parts below."""
    blocks: str
    final_norm: str
    rotary: str
    attention_norm: str
    """In a block, as the parts below: the norm before attention."""
    query: str
    key: str
    value: str
    output: str
    mlp_norm: str
    """The norm before the MLP."""
    gate: str
    up: str
    down: str
    has_qkv_biases: bool
    """Whether queries, keys and values have biases; no other projection of a family has any."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The seven projections of a block: what adapters are added to."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    @property
    def projections(self) -> tuple[str, ...]:
        """The same by their own names."""
        return tuple(path.rpartition(".")[2] for path in self.paths)


_LLAMA = Family(
    decoder="model",
    head="lm_head",
    embedding="embed_tokens",
    blocks="layers",
    final_norm="norm",
    rotary="rotary_emb",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    has_qkv_biases=False,
)
FAMILIES = {"llama": _LLAMA, "qwen2": dataclasses.replace(_LLAMA, has_qkv_biases=True)}
"""Model type of a transformers configuration -> its family. Source: transformers' model files."""


def family_of(model_or_config: Any) -> Family:
    """The family of a model (wrapped by adapters or not) or of a transformers configuration.

    Raises ValueError, naming the families there are, for any other.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if config.model_type not in FAMILIES:
        raise _unsupported([f"model type {config.model_type!r}"])
    return FAMILIES[config.model_type]


def causal_model(model: Any) -> Any:
    """The transformers causal model inside a model that may be wrapped by adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: nn.Module) -> Any:
    """The decoder (embedding, blocks, final norm) of a model that may be wrapped by adapters."""
    causal = causal_model(model)
    return causal.get_submodule(family_of(causal).decoder)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model that may be wrapped by adapters, first to last."""
    return decoder_of(model).get_submodule(family_of(model).blocks)


def check_layer(layer: int, num_layers: int, setting: str = "base.layer") -> None:
    """Raise ValueError unless block `layer` exists in a model of `num_layers` blocks."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"{setting}: got {layer}, expected 0 to {num_layers - 1}: the model has {num_layers}"
            f" blocks and layer K is the output of block K. Set --{setting}."
        )


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder.

    Example, Qwen2.5-7B: layers=28, heads=28, groups=4, head_dim=128, vocab_size=152_064,
    max_positions=32_768, epsilon=1e-6; share=7, query_width=3_584, rotated_width=4_096.
    """

    layers: int
    heads: int
    """Of queries."""
    groups: int
    """Heads of keys and values."""
    head_dim: int
    vocab_size: int
    max_positions: int
    epsilon: float
    """Of RMSNorm."""

    @property
    def share(self) -> int:
        """Query heads that read the same keys and values."""
        return self.heads // self.groups

    @property
    def query_width(self) -> int:
        """Numbers in the queries of a token."""
        return self.heads * self.head_dim

    @property
    def rotated_width(self) -> int:
        """Numbers in the queries and keys of a token."""
        return (self.heads + self.groups) * self.head_dim


def decoder_shape(config: Any) -> DecoderShape:
    """The sizes of a base that the generation engine can run.

    `config`: transformers' own, or that of `config_files.known_config`. Raises ValueError, naming
    what is supported, for any other base.
    """
    unsupported = [] if config.model_type in FAMILIES else [f"model type {config.model_type!r}"]
    if (activation := getattr(config, "hidden_act", None)) != "silu":
        unsupported.append(f"activation function {activation!r}")
    if getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False):
        unsupported.append("biases of the output or MLP projections")
    if set(getattr(config, "layer_types", None) or ("full_attention",)) != {"full_attention"}:
        unsupported.append("sliding-window attention")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        unsupported.append("rotary frequencies that change with the length")
    if unsupported:
        raise _unsupported(unsupported)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderShape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
    )


def _unsupported(parts: list[str]) -> ValueError:
    return ValueError(
        f"base.model: got {', '.join(parts)}, expected a model of type"
        f" {' or '.join(FAMILIES)} (RMSNorm, rotary positions, silu MLP). Choose such a base."
    )
