"""LoRA adapters over a frozen base: made, loaded, switched, saved.

Verbalizer, reward scorer and judge scorer are adapters over the same base; a process that needs
several loads the base once and switches between them. Protects the rule: only adapters are saved,
never the base, its embedding or its vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, TaskType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from nla_ray.base.adapter_files import (
    WEIGHTS_NAME,
    as_in_wrapper,
    lora_settings,
    read_lora,
    tensors_of_blocks,
)
from nla_ray.base.families import blocks_of, causal_model, family_of, quantiser_of, wrapper_of
from nla_ray.settings.config import LoraSettings

AdaptedModel = PeftModelForCausalLM
"""A causal model with adapters; a subclass may have another forward."""
Wrap = Callable[[nn.Module, LoraConfig, str], AdaptedModel]
"""Makes an adapted model: (causal model, settings in peft's words, name of the first adapter)."""


def add_lora(
    model: nn.Module,
    settings: LoraSettings,
    name: str = "default",
    *,
    trainable: bool = True,
    num_blocks: int | None = None,
    seed: int = 0,
    wrap: Wrap = AdaptedModel,
) -> PeftModel:
    """Add a fresh adapter to a family's matrices in every block, and return the wrapped model.

    A model without adapters is wrapped by `wrap`. The adapter is added to the first `num_blocks`
    blocks when that is given, and becomes the active one. It changes nothing yet (its second factor
    is zero); the first factor is drawn from `seed`. Its weights are float32 over a base of any
    type. Raises ValueError when an adapter of that name exists, and for a base of an unsupported
    family.
    """
    family = family_of(model)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(family.projections),
        fan_in_fan_out=family.transposed,
        layers_to_transform=None if num_blocks is None else list(range(num_blocks)),
        task_type=TaskType.CAUSAL_LM,
        inference_mode=not trainable,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(model, PeftModel):
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
            model = wrap(model, config, name)
        else:
            _require_new(model, name)
            model.add_adapter(name, config)
    _check_places(model, name, num_blocks)
    activate(model, name, trainable=trainable)
    return model


def _check_places(model: PeftModel, name: str, num_blocks: int | None) -> None:
    """Raise ValueError unless an adapter sits on its family's matrices and on nothing else.

    peft adds it to whatever ends in the names that it is given.
    """
    expected = set(family_of(model).matrices(len(blocks_of(model)[:num_blocks])))
    found = {
        path
        for path, module in causal_model(model).named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }
    if found != expected:
        raise ValueError(
            f"adapter {name!r}: got {len(found)} matrices, expected the {len(expected)} of this"
            f" family; they differ in {min(found ^ expected)!r}. Correct the family's row in"
            " nla_ray/base/families.py."
        )


def load_adapter(
    model: nn.Module,
    folder: Path | str,
    name: str = "default",
    *,
    trainable: bool = False,
    wrap: Wrap = AdaptedModel,
) -> PeftModel:
    """Load a saved adapter, make it the active adapter, and return the wrapped model.

    A model without adapters is wrapped by `wrap`. Adapters of a model with more blocks load into a
    model with fewer (a verbalizer's into a reconstructor's base): weights of missing blocks are
    left out. Raises ValueError for what `read_adapter` refuses, for a tensor that has no place in
    the base, and for a place of the adapter that gets none.
    """
    is_wrapped = wrapper_of(causal_model(model).config) is not None
    state, config = read_lora(folder, is_wrapped=is_wrapped)
    state = tensors_of_blocks(state, model, folder)
    config.inference_mode = not trainable
    if isinstance(model, PeftModel):
        _require_new(model, name)
        model.add_adapter(name, config)
    else:
        model = wrap(model, config, name)
    if not trainable:
        model.eval()
    set_adapter_state(model, state, name)
    activate(model, name, trainable=trainable)
    return model


def merged_adapter(model: nn.Module, folder: Path | str) -> Any:
    """A model whose weights are those of a loaded base and a saved adapter together.

    The base's own weights are changed, in their own type. Raises ValueError for what `load_adapter`
    refuses, and for packed weights.
    """
    package = quantiser_of(causal_model(model).config)
    if package is not None:
        raise ValueError(
            f"adapter {str(folder)!r}: got a base of weights packed by {package}, expected plain"
            " ones: an adapter is not merged into packed weights. Name the plain base."
        )
    merged = load_adapter(model, folder).merge_and_unload()
    config: Any = merged.config
    if hasattr(config, "wrapped_in"):  # it stands alone now
        del config.wrapped_in
    # Else its weights are saved by the names of the files that they came from, turned round.
    vars(merged).pop("_weight_conversions", None)
    return merged


def save_adapter(model: PeftModel, folder: Path | str, name: str = "default") -> None:
    """Write adapter_config.json and adapter_model.safetensors into `folder` itself.

    The adapter's name is in neither, so that it loads under any other. Of a text model beside
    others its modules are named as in the whole model.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model, name)
    config: Any = copy.copy(_lora_config(model, name))
    if wrapper_of(causal_model(model).config) is not None:
        state, config = as_in_wrapper(state, config)
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config.inference_mode = True
    # A set, whose order differs from process to process, would make another file in each.
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def adapter_settings(model: PeftModel, name: str = "default") -> LoraSettings:
    """The settings an adapter was made with."""
    return lora_settings(_lora_config(model, name))


def _lora_config(model: PeftModel, name: str) -> LoraConfig:
    """The configuration of an adapter; nothing but LoRA is ever added here."""
    return cast(LoraConfig, model.peft_config[name])


def adapter_state(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors on CPU, under their names in the saved file.

    `base_model.model....lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank].
    """
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in sorted(state.items())
    }


def set_adapter_state(model: PeftModel, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Replace the weights of a loaded adapter by tensors named as in `adapter_state`.

    Raises ValueError when they do not fit.
    """
    expected = {key: value.shape for key, value in adapter_state(model, name).items()}
    given = {key: value.shape for key, value in state.items()}
    wrong = {key for key, _ in expected.items() ^ given.items()}
    if wrong:
        raise ValueError(
            f"adapter weights for {name!r}: got {len(wrong)} tensors that do not fit, first"
            f" {min(wrong)!r}, expected the {len(expected)} of this adapter. They come from another"
            " base or rank."
        )
    set_peft_model_state_dict(model, dict(state), adapter_name=name)


def activate(model: PeftModel, name: str, *, trainable: bool = False) -> None:
    """Make an adapter the active one; it alone has gradients, and only when `trainable`."""
    if name not in model.peft_config:
        raise ValueError(
            f"adapter: got {name!r}, expected one of {sorted(model.peft_config)}. Load it first."
        )
    model.set_adapter(name, inference_mode=not trainable)


@contextmanager
def adapter_active(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Run a with-block with adapter `name`, or with the plain base when None.

    The state before comes back afterwards. A model without adapters is a plain base already. Raises
    ValueError for a name that the model lacks.
    """
    if not isinstance(model, PeftModel):
        if name is not None:
            raise ValueError(
                f"adapter: got {name!r}, expected a model that has adapters. Load it first."
            )
        yield model
        return
    if name is None:
        with model.disable_adapter():
            yield model
        return
    before = cast(str, model.active_adapter)  # a list only where adapters are mixed: never here
    if name == before:
        yield model
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    activate(model, name)
    try:
        yield model
    finally:
        activate(model, before)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _require_new(model: PeftModel, name: str) -> None:
    if name in model.peft_config:
        raise ValueError(
            f"adapter: got the name {name!r} twice, expected a new one. Loaded are "
            f"{sorted(model.peft_config)}."
        )


def matrix_shape(module: Any) -> torch.Size:
    """[out, in] of a linear layer, whatever its weights are packed in; GPT-2's are transposed."""
    if isinstance(module, nn.Linear):
        return torch.Size((module.out_features, module.in_features))
    return torch.Size(reversed(module.weight.shape))


def plain_linear(module: nn.Module) -> nn.Module:
    """The base's linear layer inside a module that may carry adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
