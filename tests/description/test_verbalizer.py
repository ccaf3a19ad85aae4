"""The verbalizer: activations in, descriptions out, under its adapter."""

from pathlib import Path

import pytest
import torch
from tiny import random_state

from nla_ray.base.adapters import adapter_state, add_lora, save_adapter, set_adapter_state
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_backbone
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.settings.config import BaseConfig, LoraSettings

LORA = LoraSettings(rank=4, alpha=8)


def test_a_verbalizer_describes_with_its_adapter_and_refuses_other_neighbours(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA)
    set_adapter_state(model, random_state(adapter_state(model)))
    save_adapter(model, tmp_path)
    info, activations = base_info(tiny_base), torch.randn(3, 32)
    loaded = Verbalizer.load(tiny_base, tmp_path, neighbours=info.neighbours)
    described = loaded.describe(activations, max_new_tokens=6)
    assert len(described) == 3 and all(
        1 <= description.num_sampled <= 6 for description in described
    )
    plain = Verbalizer.load(tiny_base, None).describe(activations, max_new_tokens=6)
    assert [description.text for description in plain] != [
        description.text for description in described
    ]
    shared = Verbalizer.load(tiny_base, tmp_path, model=model)
    assert shared.describe(activations, max_new_tokens=6) == described
    with pytest.raises(ValueError, match="neighbours"):
        Verbalizer.load(tiny_base, tmp_path, neighbours=(0, 0))


def test_samples_of_a_verbalizer_are_ordered_by_activation_and_do_not_depend_on_their_number(
    tiny_base: BaseConfig,
) -> None:
    verbalizer, activations = (
        Verbalizer.load(tiny_base, None),
        torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),
    )
    single, groups = (
        verbalizer.describe(
            activations, max_new_tokens=6, temperature=1.0, seed=5, rows=[7, 2, 9], group_size=size
        )
        for size in (1, 4)
    )
    assert len(groups) == 12 and groups[::4] == single
    assert groups[4:8] == verbalizer.describe(
        activations[1:2], max_new_tokens=6, temperature=1.0, seed=5, rows=[2], group_size=4
    )
    assert len({description.text for description in groups}) > 9
