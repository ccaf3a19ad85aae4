"""THE table of architectures: where a transformers causal model of each keeps its parts.

Adding an architecture is one row of FAMILIES, which tests/base/test_families.py then holds against
transformers. Whoever needs a part asks the table, never a guessed attribute. Protects the rule that
a base whose blocks are not understood is refused by name before anything is made from it, in the
same words by a plan and by a job. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """Parts of a block, for whoever computes it from its weights alone; dotted where inside others.

    Such a block adds attention, then a gated MLP, to the residual stream, each after its own
    RMSNorm; positions are rotary.
    """

    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    """RMSNorm of each head's queries before they are rotated; None: there is none."""
    key_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: names of the parts of an architecture; dotted where a part is inside another one."""

    decoder: str = "model"
    """In the causal model: everything but the output head."""
    head: str = "lm_head"
    """In the causal model: the output head."""
    embedding: str = "embed_tokens"
    """In the decoder, as the parts below. It may scale what it looks up; an injected vector is not
    scaled."""
    blocks: str = "layers"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    paths: tuple[str, ...]
    """In a block: the matrices that adapters are added to. Experts and routers get none."""
    parts: BlockParts | None
    """None: its blocks are run by the library's own modules alone."""
    transposed: bool = False
    """Whether the matrices are [in, out], as GPT-2's are."""
    biases: Literal["none", "qkv", "attention", "all"] = "none"
    """Matrices that have biases: none; queries, keys and values; the output too; all. What a
    configuration says of `attention_bias` comes before it."""
    mlp_matrices: int = 3
    """Matrices of an MLP, or of an expert."""
    block_norms: int = 2
    """Vectors of d_model numbers in the norms of a block."""
    final_norms: int = 1
    """The same of the final norm; two where it is a LayerNorm with a bias."""
    head_norms: Literal["none", "head", "width"] = "none"
    """Norms of queries and keys: none, over each head, or over all heads."""
    positions: str | None = None
    """In the decoder: the embedding of positions; None: there is none."""
    has_windows: bool = False
    """Whether some blocks may see a window of the last tokens only."""

    def matrices(self, num_blocks: int) -> list[str]:
        """Names in the causal model of the matrices that adapters are added to, block by block."""
        start = f"{self.decoder}.{self.blocks}"
        return [f"{start}.{block}.{path}" for block in range(num_blocks) for path in self.paths]

    @property
    def projections(self) -> tuple[str, ...]:
        """`paths` by their last names."""
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path in self.paths))


_LLAMA_PARTS = BlockParts()
_ATTENTION = (_LLAMA_PARTS.query, _LLAMA_PARTS.key, _LLAMA_PARTS.value, _LLAMA_PARTS.output)
_SEVEN = (*_ATTENTION, _LLAMA_PARTS.gate, _LLAMA_PARTS.up, _LLAMA_PARTS.down)
_LLAMA = Family(paths=_SEVEN, parts=_LLAMA_PARTS)
_HEAD_NORMED = replace(_LLAMA_PARTS, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
_QWEN3 = replace(_LLAMA, parts=_HEAD_NORMED, head_norms="head", has_windows=True)
_GEMMA2 = replace(_LLAMA, parts=None, block_norms=4, has_windows=True)
_GPT = Family(paths=(), parts=None, biases="all", mlp_matrices=2, block_norms=4, final_norms=2)
FAMILIES = {
    "llama": _LLAMA,
    "qwen2": replace(_LLAMA, biases="qkv", has_windows=True),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, paths=_ATTENTION, parts=None),
    "mistral": replace(_LLAMA, has_windows=True),
    "mixtral": replace(_LLAMA, paths=_ATTENTION, parts=None, has_windows=True),
    # Every fourth block knows no positions.
    "smollm3": replace(_LLAMA, parts=None, has_windows=True),
    # Its norms stand behind attention and MLP.
    "olmo2": replace(_LLAMA, parts=None, head_norms="width"),
    "phi3": replace(
        _LLAMA,
        parts=None,
        paths=("self_attn.qkv_proj", _LLAMA_PARTS.output, "mlp.gate_up_proj", _LLAMA_PARTS.down),
        has_windows=True,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, head_norms="head"),
    "gpt_neox": replace(
        _GPT,
        decoder="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        paths=(
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
    ),
    "gpt2": replace(
        _GPT,
        decoder="transformer",
        embedding="wte",
        blocks="h",
        final_norm="ln_f",
        paths=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        transposed=True,
        positions="wpe",
    ),
}
"""Model type of a transformers configuration -> its family. Source: transformers' model files."""


WRAPPERS = ("gemma3",)
"""Model types that hold a text model of the table beside models of images, as `text_config`."""
INNER_NAMES = {
    r"^(?:model\.language_model|language_model\.model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names of its weights in a wrapper's files, newer or older -> in the causal model."""


def wrapper_of(config: Any) -> str | None:
    """The model type around a text model, whose configuration this is; None: it stands alone."""
    return getattr(config, "wrapped_in", None)


def family_of(model_or_config: Any) -> Family:
    """The family of a model (wrapped by adapters or not) or of a transformers configuration.

    Raises ValueError, naming the families there are, for any other.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"base.model: got model type {config.model_type!r}, expected one of"
            f" {', '.join((*FAMILIES, *WRAPPERS))}. Choose such a base, or add a row to"
            " nla_ray/base/families.py: where its blocks, norms, head and matrices are."
        )
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


QUANTISERS = ("bitsandbytes", "torchao")
"""Packages by which weights of 4 or 8 bits are computed with: also the names of their methods."""


def quantiser_of(config: Any) -> str | None:
    """The package that a base's weights need, for those of few bits; None: they are plain numbers.

    Raises ValueError for a method that no adapter can be trained on here.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else vars(settings)
    method = str(getattr(settings["quant_method"], "value", settings["quant_method"]))
    if method not in QUANTISERS:
        raise ValueError(
            f"base.model: got weights quantised by {method!r}, expected plain ones or those of"
            f" {' or '.join(QUANTISERS)}. Choose such a version of the base."
        )
    return method


def longest_context(config: Any) -> int:
    """Tokens up to which every block of a base sees all that stands before.

    The shortest window where some blocks have one: within it they attend as all others do, and a
    prompt may be read in whichever way is fastest.
    """
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    is_used = types is None or "sliding_attention" in types
    if family_of(config).has_windows and window is not None and is_used:
        return min(window, config.max_position_embeddings)
    return config.max_position_embeddings


def check_context(config: Any, max_tokens: int) -> None:
    """Raise ValueError for prompts that some block would not see whole, or have no positions for.

    A base of rotary positions without windows is read beyond what it was trained for, as ever.
    """
    longest = longest_context(config)
    is_strict = longest < config.max_position_embeddings or family_of(config).positions is not None
    if is_strict and max_tokens > longest:
        raise ValueError(
            f"base.max_tokens: got {max_tokens}, expected at most {longest}, what every block of"
            " this base sees at once. Set --base.max-tokens; longer texts are counted and left out."
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
    """The sizes of a base; of a family where every head has keys and values, there are as many.

    `config`: transformers' own, or that of `config_files.known_config`. Raises ValueError for a
    base without a row.
    """
    family_of(config)
    heads = config.num_attention_heads
    return DecoderShape(
        layers=config.num_hidden_layers,
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_positions=longest_context(config),
        epsilon=getattr(config, "rms_norm_eps", 1e-6),
    )


def beyond_parts(config: Any) -> list[str]:
    """What keeps a base from being computed from the `parts` of its blocks; nothing: it can be."""
    family = family_of(config)
    if family.parts is None:
        return [f"blocks of {config.model_type!r}"]
    found = ["quantised weights"] if quantiser_of(config) else []
    if (activation := getattr(config, "hidden_act", None)) != "silu":
        found.append(f"activation function {activation!r}")
    if getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False):
        found.append("biases of the output or MLP projections")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        found.append("rotary frequencies that change with the length")
    return found
