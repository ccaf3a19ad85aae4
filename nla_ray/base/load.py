"""How a base is loaded: its configuration, its tokenizer, its weights, whole or the first blocks.

Knows transformers; knows nothing of adapters, of prompts or of Ray. Protects the rules that nothing
above the wanted blocks is loaded, that no weight is drawn at random because a file lacks it, and
that no process multiplies in a type that its processor emulates.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nla_ray.base.config_files import PUBLISHED_CONFIGS, as_config
from nla_ray.base.families import INNER_NAMES, check_layer, family_of, quantiser_of, wrapper_of
from nla_ray.base.layers import keep_blocks
from nla_ray.base.prompts import RAW_TEMPLATE, fix_date
from nla_ray.base.sources import base_folder, quiet_loading
from nla_ray.base.spread import spread_blocks
from nla_ray.settings.config import BaseConfig
from nla_ray.settings.precision import cpu_dtype, processor_has_bf16


def load_model_config(base: BaseConfig) -> Any:
    """The base's transformers configuration: from its folder or hub, else from PUBLISHED_CONFIGS.

    Of a text model beside others it is the text model's, with `wrapped_in`. No weights are read.
    Raises ValueError for a base that cannot be found, and for one of an unsupported family.
    """
    from transformers import AutoConfig

    try:
        folder = base_folder(base.model, weights=False)
    except ValueError:
        if base.model not in PUBLISHED_CONFIGS:
            raise
        return AutoConfig.for_model(**PUBLISHED_CONFIGS[base.model])
    # First, because transformers writes a paragraph about a type that it does not know.
    known = as_config(json.loads((folder / "config.json").read_text()))
    family_of(known)
    _require_quantiser(known, base)
    config = AutoConfig.from_pretrained(folder)
    if (wrapper := wrapper_of(known)) is None:
        return config
    inner = config.get_text_config()
    inner.wrapped_in = wrapper
    return inner


def _require_quantiser(config: Any, base: BaseConfig) -> None:
    package = quantiser_of(config)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"base.model {base.model!r}: got weights quantised by {package}, expected that package"
            f" installed. Install it with: pip install {package}"
        )


def load_tokenizer(base: BaseConfig) -> Any:
    """The base's tokenizer; padding goes to the right and never needs a new token.

    A chat template that prints today's date prints `base.date`. With `base.template` `raw` the
    template is RAW_TEMPLATE, after the token that the tokenizer itself begins a text with. Raises
    ValueError for a tokenizer without chat template.
    """
    from transformers import AutoTokenizer

    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(base_folder(base.model, weights=False))
    if base.template == "raw":
        tokenizer.chat_template = first_token(tokenizer) + RAW_TEMPLATE
    if tokenizer.chat_template is None:
        raise ValueError(
            f"base.model {base.model!r}: got a tokenizer without chat template, expected a chat"
            " model. Name an instruction-tuned model, or read texts as they are, without turns:"
            " --base.template raw."
        )
    tokenizer.chat_template = fix_date(tokenizer.get_chat_template(), base.date)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def first_token(tokenizer: Any) -> str:
    """What a tokenizer puts before every text: the token that begins a sequence, or nothing."""
    [first] = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token if first == tokenizer.bos_token_id else ""


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
    """Whether training, and reading descriptions with what was trained, multiplies in bfloat16.

    As configured; with `auto`, where the processor has instructions for it.
    """
    if base.training_dtype != "auto":
        return base.training_dtype == "bfloat16"
    if base.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return processor_has_bf16()


def weight_dtype(base: BaseConfig) -> torch.dtype:
    """The type that a base is held and computed in, in this process: `base.dtype` as a rule.

    A CPU without instructions for bfloat16 gets the same bfloat16 numbers in float32.
    """
    on_cpu = torch_device(base).type == "cpu"
    return getattr(torch, cpu_dtype(base.dtype) if on_cpu else base.dtype)


def load_backbone(
    base: BaseConfig,
    *,
    num_blocks: int | None = None,
    attention: str | None = None,
    num_gpus: int = 1,
) -> Any:
    """The base as a frozen causal model in eval mode, on its device, in the type of `weight_dtype`.

    With `num_blocks` only the first blocks are read from disk, and neither final norm nor output
    head. Such a model has the causal model's parameter names (so adapters fit both) but yields the
    residual stream, to be read with `ResidualReader`. `attention`: an implementation by its name in
    transformers. `num_gpus`: of this process, over which these blocks are spread; on a CPU it means
    nothing.
    """
    from transformers import AutoModelForCausalLM

    folder, device = base_folder(base.model), torch_device(base)
    _choose_attention(device)
    options = {
        "dtype": getattr(torch, base.dtype),
        "attn_implementation": attention,
        "key_mapping": INNER_NAMES,  # some files have them, whatever their type says
    }
    config = load_model_config(base)
    is_quantised = quantiser_of(config) is not None
    if is_quantised:  # such weights are made where they stay
        options["device_map"] = {"": str(device)}
    with quiet_loading():
        if num_blocks is None:
            model: Any = _from_files(AutoModelForCausalLM, folder, config, options)
        else:
            check_layer(num_blocks - 1, config.num_hidden_layers)
            model = _load_first_blocks(folder, config, range(num_blocks), options)
    _turn_dropout_off(model)
    if is_quantised:
        return model.eval().requires_grad_(False)
    if weight_dtype(base) != model.dtype:
        # Rounded to the configured type before: every processor holds the same numbers.
        model = model.float()
    if num_gpus > 1 and device.type == "cuda":
        assert num_blocks is not None, "a whole base is spread by vLLM alone"
        spread_blocks(model, [torch.device("cuda", number) for number in range(num_gpus)])
    else:
        model.to(device)
    return model.eval().requires_grad_(False)


def _from_files(
    kind: Any, folder: Path, config: Any, options: dict[str, Any], unused: str | None = None
) -> Any:
    """A model of a class of transformers, of which every weight was in the files.

    What the library does not find it draws at random. `unused`: a module that is not needed, so
    that it may be missing or of another shape. Raises ValueError for any other weight.
    """
    if quantiser_of(config) is not None:  # packed weights have names of their own
        return kind.from_pretrained(folder, config=config, **options)
    model, found = kind.from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    odd = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    absent = sorted(name for name in odd if unused is None or not name.startswith(f"{unused}."))
    if absent:
        raise ValueError(
            f"base.model {str(folder)!r}: got no weights of the right shape for {len(absent)}"
            f" tensors, first {absent[0]!r}, expected every one that its config.json asks for."
            " The files are not whole, or have names that are not known here; get them again."
        )
    return model


def _turn_dropout_off(model: nn.Module) -> None:
    """A frozen base is the same in training as in reading; an adapter has a dropout of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (a float, where pyright sees modules)


def _load_first_blocks(
    folder: Path, config: Any, kept: range, options: dict[str, Any]
) -> nn.Module:
    """A causal model of the first blocks alone, headless; `options` of transformers' loading."""
    from transformers import AutoModel, AutoModelForCausalLM

    cut, family = keep_blocks(config, kept), family_of(config)
    if quantiser_of(config) is None:
        return _headless(cut, _from_files(AutoModel, folder, cut, options, family.final_norm))
    # Weights of few bits are read whole.
    whole = AutoModelForCausalLM.from_pretrained(folder, **options)
    decoder: Any = whole.get_submodule(family.decoder)
    blocks: Any = decoder.get_submodule(family.blocks)
    first = nn.ModuleList([blocks[layer] for layer in kept])
    decoder.set_submodule(family.blocks, first, strict=True)
    decoder.config = cut
    return _headless(cut, decoder)


def _choose_attention(device: torch.device) -> None:
    """On a GPU: none of cuDNN's, which plans every new length, .2 s of an H100 for each.

    Batches have many lengths. PyTorch's other kernels need no plan, and a step is as fast with them
    (SmolLM2-135M's shape: 261 ms, and 270 with cuDNN's plans made).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _headless(config: Any, decoder: nn.Module) -> Any:
    """A causal model around `decoder` with no final norm and no output head."""
    from transformers import AutoModelForCausalLM

    config.tie_word_embeddings = False
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    family = family_of(config)
    shell.set_submodule(family.decoder, decoder, strict=True)
    shell.set_submodule(family.head, nn.Identity(), strict=True)
    decoder.set_submodule(family.final_norm, nn.Identity(), strict=True)
    return shell


def random_backbone(
    config: Any, *, device: str = "meta", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A frozen causal model of this shape with random weights; on `meta`, without any weights.

    For checks of shapes and memory.
    """
    from transformers import AutoModelForCausalLM

    _choose_attention(torch.device(device))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
