"""Saved adapters, of this package or another tool, read as the plain LoRA that computes the same.

Knows the files of peft. Protects the rule that an adapter computes here what it computes in peft,
or is refused by name: nothing of it is ever left out in silence.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from nla_ray.base.families import blocks_of, family_of
from nla_ray.settings.config import LoraSettings

WEIGHTS_NAME = "adapter_model.safetensors"
_CONFIG_NAME, _OLD_WEIGHTS_NAME = "adapter_config.json", "adapter_model.bin"
_PREFIX = "base_model.model."
"""Of every tensor in a saved adapter: peft's wrapper around the causal model."""
_IN_WRAPPER = re.compile(rf"^{re.escape(_PREFIX)}(?:model\.language_model|language_model\.model)\.")
"""Before a text model's names where its adapter was made on the whole model beside it."""
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_COMPUTED = frozenset(
    "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules"
    " layers_to_transform layers_pattern".split()
)
"""Settings of a saved adapter that decide its update, and that are followed here."""
_WITHOUT_INFLUENCE = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
    " lora_dropout megatron_core qalora_group_size loftq_config eva_config corda_config"
    " lora_ga_config runtime_config ensure_weight_tying fan_in_fan_out".split()
)
"""Settings that decide how an adapter was made or started, not what it computes now."""
_PLAIN_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Every other start changes the base's own weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Settings of which some values change nothing. Any other setting must be off."""


def read_adapter(
    folder: Path | str, *, is_wrapped: bool = False
) -> tuple[dict[str, Tensor], LoraSettings]:
    """A saved adapter without a model: its tensors as `adapter_state` names them, its settings.

    `is_wrapped`: of a text model beside others, whose names it may have in the whole model.

    An adapter whose factors have several scales or ranks comes as the plain one that computes the
    same: one rank, and a scale of 1. Raises ValueError when the folder holds no adapter, and for
    what is no LoRA of weight matrices: DoRA, biases, whole modules, half a pair.
    """
    state, config = read_lora(folder, is_wrapped=is_wrapped)
    return state, lora_settings(config)


def adapter_digest(folder: Path | str) -> str:
    """First 16 hex digits of the SHA-256 of a saved adapter's settings and weights."""
    digest = hashlib.sha256()
    for file in _files_of(Path(folder)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def lora_settings(config: LoraConfig) -> LoraSettings:
    """The settings of a plain LoRA, from its configuration in peft's words."""
    return LoraSettings(rank=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)


def read_lora(
    folder: Path | str, *, is_wrapped: bool = False
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and configuration of a saved adapter, as a plain LoRA of one rank and one scale."""
    config_file, _ = _files_of(Path(folder))
    _require_plain(config_file)
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    state = load_peft_weights(str(folder), device="cpu")
    if is_wrapped:
        state = {_IN_WRAPPER.sub(f"{_PREFIX}model.", name): state[name] for name in state}
    modules = _modules_of(state, folder)
    if is_wrapped:  # the settings may say where it is in the whole model
        config.target_modules = sorted({module.rpartition(".")[2] for module in modules})
        config.layers_to_transform = _blocks_of(modules)
    ranks = {module: len(state[module + _DOWN]) for module in modules}
    scales = {module: _scale(config, module, rank, folder) for module, rank in ranks.items()}
    if config.use_rslora or config.rank_pattern or config.alpha_pattern:
        rank = max(ranks.values())
        for module in modules:
            state[module + _DOWN] = _with_rank(state[module + _DOWN].float(), rank, 0)
            scaled = state[module + _UP].float() * scales[module]
            state[module + _UP] = _with_rank(scaled, rank, 1)
        config.r = config.lora_alpha = rank
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    config.init_lora_weights = True
    return state, config


def _files_of(folder: Path) -> tuple[Path, Path]:
    """The adapter's files, settings and weights. Raises ValueError when one is missing."""
    config, weights = folder / _CONFIG_NAME, folder / WEIGHTS_NAME
    if not weights.is_file() and (folder / _OLD_WEIGHTS_NAME).is_file():
        weights = folder / _OLD_WEIGHTS_NAME
    missing = [file.name for file in (config, weights) if not file.is_file()]
    if missing:
        raise ValueError(
            f"adapter: got {str(folder)!r} without {' and '.join(missing)}, expected a saved"
            f" adapter. Name the folder that holds {_CONFIG_NAME} and {WEIGHTS_NAME}."
        )
    return config, weights


def _require_plain(file: Path) -> None:
    """Raise ValueError unless a configuration is of a LoRA that is computed here as in peft."""
    values = json.loads(file.read_text())
    unsupported = {
        name: value
        for name, value in values.items()
        if name not in _COMPUTED | _WITHOUT_INFLUENCE
        and (value not in _PLAIN_VALUES[name] if name in _PLAIN_VALUES else value)
    }
    if unsupported:
        got = ", ".join(f"{name}={value!r}" for name, value in sorted(unsupported.items()))
        raise ValueError(
            f"adapter {str(file.parent)!r}: got {got}, expected a LoRA of weight matrices alone"
            " (use_rslora, rank_pattern and alpha_pattern are computed). Train it again as such a"
            " LoRA."
        )


def _modules_of(state: Mapping[str, Tensor], folder: Path | str) -> list[str]:
    """The weight matrices that an adapter changes: names of its tensors, without their endings.

    Raises ValueError for no tensor at all, for other tensors than factors, and for half a pair.
    """
    modules = {key.removesuffix(_DOWN).removesuffix(_UP) for key in state}
    expected = {module + half for module in modules for half in (_DOWN, _UP)}
    odd = sorted(expected ^ state.keys())
    if odd or not state:
        raise ValueError(
            f"adapter {str(folder)!r}: got {len(state)} tensors, of which {len(odd)} are no factor"
            f" or lack the other one{f', first {odd[0]!r}' if odd else ''}, expected pairs of"
            f" ...{_DOWN} [rank, in] and ...{_UP} [out, rank]. Save it again with peft's"
            " save_pretrained."
        )
    return sorted(modules)


def _blocks_of(modules: Sequence[str]) -> list[int]:
    """Numbers of the blocks that hold these modules, ascending."""
    return sorted({int(found[1]) for found in map(_BLOCK.search, modules) if found})


def as_in_wrapper(
    state: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """A text model's adapter under the names that the whole model beside it gives its modules.

    So it loads in peft around what `AutoModelForCausalLM` makes of the folder. A pattern keeps it
    away from the matrices of images, whose names end alike.
    """
    modules = sorted({key.removesuffix(_DOWN).removesuffix(_UP) for key in state})
    blocks = "|".join(map(str, _blocks_of(modules)))
    paths = "|".join(sorted({re.escape(_BLOCK.split(module)[-1]) for module in modules}))
    config = copy.copy(config)
    config.target_modules = rf"model\.language_model\.layers\.(?:{blocks})\.(?:{paths})"
    config.layers_to_transform = None
    start = f"{_PREFIX}model."
    renamed = {
        f"{start}language_model.{key.removeprefix(start)}": value for key, value in state.items()
    }
    return renamed, config


def _scale(config: LoraConfig, module: str, rank: int, folder: Path | str) -> float:
    """What multiplies B A of a module. Source: `LoraLayer.update_layer` of peft.

    Raises ValueError when the factors have another rank than the configuration says.
    """
    name = module.removeprefix(_PREFIX)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    expected = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    if rank != expected:
        raise ValueError(
            f"adapter {str(folder)!r}: got factors of rank {rank} for {name}, expected rank"
            f" {expected} as its configuration says. Its files do not belong together."
        )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _with_rank(factor: Tensor, rank: int, dim: int) -> Tensor:
    """A factor filled up with zeros to `rank` in dimension `dim`: B A stays the same."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def tensors_of_blocks(
    state: Mapping[str, Tensor], model: nn.Module, folder: Path | str
) -> dict[str, Tensor]:
    """The tensors of the blocks that a model has; those of further blocks are left out.

    Raises ValueError for tensors of any other module, and when no tensor is left.
    """
    family, num_blocks = family_of(model), len(blocks_of(model))
    paths = "|".join(re.escape(path) for path in family.paths)
    start = f"{_PREFIX}{family.decoder}.{family.blocks}."
    pattern = re.compile(rf"{re.escape(start)}(\d+)\.(?:{paths})\.lora_[AB]\.weight")
    matches = {key: pattern.fullmatch(key) for key in state}
    homeless = sorted(key for key, match in matches.items() if match is None)
    found = {
        key: state[key] for key, match in matches.items() if match and int(match[1]) < num_blocks
    }
    if homeless or not found:
        raise ValueError(
            f"adapter {str(folder)!r}: got {len(homeless)} of {len(state)} tensors without a place"
            f" in the base, such as {(homeless or sorted(state))[0]!r}, expected names such as"
            f" {f'{start}0.{family.paths[0]}{_DOWN}'!r} in {num_blocks} blocks. It is of another"
            " base, or another tool has named its tensors: load it on its own base, or rename"
            " them."
        )
    return found
