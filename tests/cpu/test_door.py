"""What only a CPU runs stays away from models on a GPU; none is here, so its device is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nla_ray.base.adapters import add_lora
from nla_ray.base.load import load_backbone, load_model_config, random_backbone
from nla_ray.cpu import door
from nla_ray.cpu.attention import GROUPED
from nla_ray.cpu.projection import packing_works
from nla_ray.settings.config import BaseConfig, ComputeConfig, LoraSettings
from nla_ray.settings.presets import PRESETS
from nla_ray.training import attention
from nla_ray.training.verbalizer import TrainableVerbalizer
from nla_ray.training.workers import trainer_arguments

LORA = LoraSettings(rank=4, alpha=8)


def test_the_door_is_open_to_cpus_only() -> None:
    assert door.is_for_device(torch.device("cpu"))
    assert not any(door.is_for_device(torch.device(name)) for name in ("cuda", "cuda:1", "meta"))
    assert door.is_for_every_kind(ComputeConfig())
    assert not door.is_for_kind(PRESETS["qwen2.5-7b"]().compute, "trainer")


def test_log_probs_are_computed_here_for_a_model_on_a_cpu_and_by_the_library_elsewhere(
    tiny_base: BaseConfig,
) -> None:
    elsewhere = random_backbone(load_model_config(tiny_base), device="meta")
    assert not add_lora(elsewhere, LORA, wrap=TrainableVerbalizer).scores_labels
    assert add_lora(load_backbone(tiny_base), LORA, wrap=TrainableVerbalizer).scores_labels


def test_a_gpu_trains_with_the_librarys_attention(
    tiny_base: BaseConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dataclasses.replace(tiny_base, training_dtype="bfloat16")
    assert attention.training_attention(base) == GROUPED
    monkeypatch.setattr(attention, "torch_device", lambda base: torch.device("cuda"))
    assert attention.training_attention(base) is None


def test_a_weight_elsewhere_is_not_packed() -> None:
    assert not packing_works(torch.empty(2, 2, device="meta"))


def test_a_trainer_that_books_a_gpu_is_not_told_to_use_the_cpu(tmp_path) -> None:
    config = PRESETS["nano"]()
    on_gpu = dataclasses.replace(config, compute=ComputeConfig(trainer_gpus=1, zero_stage=0))
    sizes = {"seed": 0, "blocks": 1, "tokens": 1}
    assert trainer_arguments(config, tmp_path, **sizes)["use_cpu"]
    assert not trainer_arguments(on_gpu, tmp_path, **sizes)["use_cpu"]


def test_a_trainer_on_a_gpu_recomputes_what_is_too_large_to_keep(tmp_path) -> None:
    config = PRESETS["nano"]()
    for gpus, tokens, is_recomputed in ((1, 100, False), (1, 10**7, True), (0, 10**7, False)):
        compute = ComputeConfig(trainer_gpus=gpus, zero_stage=0)
        placed = dataclasses.replace(config, compute=compute)
        arguments = trainer_arguments(placed, tmp_path, seed=0, blocks=6, tokens=tokens)
        assert arguments["activation_checkpointing"] == is_recomputed
