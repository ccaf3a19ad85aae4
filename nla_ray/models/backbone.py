"""The frozen base model: what it is, how it is loaded, and what "layer K" means when it is run.

Knows transformers; knows nothing of adapters' training, of prompts or of Ray. Protects two rules:
layer K is the output of block K (never the final norm's), and nothing above the wanted blocks is
loaded or run.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.config import BaseConfig
from nla_ray.injection import build_injection_prompt
from nla_ray.models.sources import (
    base_folder,
    origin_of,
    quiet_loading,
    tokenizer_digest,
    weights_digest,
)

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
}
"""Shapes of hub models that presets name, so that a plan needs no network. Source: the models' own
config.json."""


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """Identity and shape of a base, as manifests record it."""

    name: str
    digest: str
    """Hash of configuration and weights (hub models: of id and commit)."""
    tokenizer_digest: str
    model_type: str
    d_model: int
    num_layers: int
    vocab_size: int
    """Rows of the embedding table, which may exceed the tokenizer's length; virtual ids start
    here."""
    layer: int
    injection_norm: float
    marker: str
    marker_id: int
    neighbours: tuple[int, int]
    """Ids left and right of the marker in the verbalizer's prompt."""
    origin: str | None
    """The file that a converted model was made from, with its digest."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "neighbours": list(self.neighbours)}


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


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ValueError unless block `layer` exists in a model of `num_layers` blocks."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"base.layer: got {layer}, expected 0 to {num_layers - 1}: the model has {num_layers}"
            " blocks and layer K is the output of block K. Set --base.layer."
        )


def base_info(base: BaseConfig, tokenizer=None) -> BaseInfo:
    """Identity and shape of a base, from its configuration and tokenizer. Raises ValueError for a
    layer or marker it lacks."""
    config = load_model_config(base)
    check_layer(base.layer, config.num_hidden_layers)
    folder = base_folder(base.model, weights=False)
    prompt = build_injection_prompt(tokenizer or load_tokenizer(base), base.marker)
    return BaseInfo(
        name=base.model,
        digest=weights_digest(folder),
        tokenizer_digest=tokenizer_digest(folder),
        model_type=config.model_type,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        layer=base.layer,
        injection_norm=base.injection_norm,
        marker=base.marker,
        marker_id=prompt.marker_id,
        neighbours=prompt.neighbours,
        origin=origin_of(folder),
    )


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
        {
            "dtype": getattr(torch, base.dtype),
            "attn_implementation": attention,
        },
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


def keep_blocks(config, num_blocks: int):
    """A copy of a model configuration that has the first `num_blocks` blocks only."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    return config


def _headless(config, decoder: nn.Module):
    """A causal model around `decoder` with no final norm and no output head."""
    from transformers import AutoModelForCausalLM

    config.tie_word_embeddings = False
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    shell.model, shell.lm_head = decoder, nn.Identity()
    shell.model.norm = nn.Identity()
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


# layer K ------------------------------------------------------------------------------------------


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers causal model inside a model that may be wrapped by adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ResidualReader:
    """Runs blocks 0..max(layers) of a model and returns the residual stream after each wanted
    block.

    It shares the model's weights (and whatever adapter is active in them) and runs nothing above
    the highest wanted block. This is the one definition of layer K: the output of block K = Hugging
    Face `hidden_states[K + 1]`, before the final norm when K is the last block.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        decoder = causal_model(model).model
        for layer in layers:
            check_layer(layer, len(decoder.layers))
        self.layers = tuple(sorted(set(layers)))
        self._decoder = _first_blocks(decoder, self.layers[-1] + 1)

    def read(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """[batch, seq] ids -> {layer: [batch, seq, d_model]}.

        Rows are padded on the RIGHT, with any id: attention is causal, so no padding mask is needed
        for the real tokens, and the output at padding means nothing. Rows of several sequences
        (`models.prefix.pack`) come with their positions and with the mask that is added to
        attention's weights, [batch, 1, seq, seq].
        """
        outputs: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [
            self._decoder.layers[layer].register_forward_hook(keep(layer))
            for layer in self.layers[:-1]
        ]
        try:
            outputs[self.layers[-1]] = self._decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=False,
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _first_blocks(decoder: nn.Module, num_blocks: int) -> nn.Module:
    """A decoder of the first blocks, without final norm, that shares every weight with
    `decoder`."""
    view = copy.copy(decoder)
    # copy.copy shares the registry, and the original must keep its blocks and norm
    view._modules = dict(decoder._modules)
    view.layers = nn.ModuleList(list(decoder.layers)[:num_blocks])
    view.norm = nn.Identity()
    # DeepSpeed's, put on the decoder, know only it
    for name in [name for name in vars(view) if name.endswith("_hooks")]:
        setattr(view, name, OrderedDict())
    view.config = keep_blocks(decoder.config, num_blocks)
    return view
