"""Which architectures are understood, and the sizes of a decoder of one of them.

Protects the rule that a base whose blocks are not understood is refused by name before anything is
made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SUPPORTED_MODEL_TYPES = ("llama", "qwen2")


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    epsilon: float

    @property
    def share(self) -> int:
        return self.heads // self.groups

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def rotated_width(self) -> int:
        """Queries and keys."""
        return (self.heads + self.groups) * self.head_dim


def decoder_shape(config: Any) -> DecoderShape:
    """The shape of a model that this decoder can run, from its transformers configuration.

    Raises ValueError, naming what is supported, for any other.
    """
    unsupported = (
        [] if config.model_type in SUPPORTED_MODEL_TYPES else [f"model type {config.model_type!r}"]
    )
    if (activation := getattr(config, "hidden_act", None)) != "silu":
        unsupported.append(f"activation function {activation!r}")
    if getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False):
        unsupported.append("biases of the output or MLP projections")
    if set(getattr(config, "layer_types", None) or ("full_attention",)) != {"full_attention"}:
        unsupported.append("sliding-window attention")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") in (
        "dynamic",
        "longrope",
    ):
        unsupported.append("rotary frequencies that change with the length")
    if unsupported:
        raise ValueError(
            f"generation engine: got {', '.join(unsupported)}, expected a model of type"
            f" {' or '.join(SUPPORTED_MODEL_TYPES)} (RMSNorm, rotary positions, silu MLP). Choose"
            " such a base."
        )
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
