"""What the GPU benchmark runs on: a base of a published shape with random weights, and its texts.

No hub and no corpus is needed: the tokenizer is the embedded base's, activations and labels are
drawn. Knows no section of the benchmark.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nla_ray.base.load import PUBLISHED_CONFIGS, load_tokenizer, random_backbone, torch_device
from nla_ray.base.prompts import InjectionPrompt, build_injection_prompt
from nla_ray.base.sources import base_folder
from nla_ray.bench.models import read_parameters
from nla_ray.settings.config import BaseConfig, RunConfig
from nla_ray.settings.presets import preset

ShapeName = Literal["qwen2.5-7b", "small"]

_EMBEDDED = "embedded:nano"
_WORDS = "topics tokens response python licence table of the a test next explains code file".split()
_LABEL_WORDS = 45
"""About 60 tokens of the embedded tokenizer, as long as real labels are."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A base's shape, and how much work the sections do on it."""

    config: dict[str, Any]
    """Of transformers, as `AutoConfig.for_model` takes it."""
    layer: int
    batch: int
    """Examples of a training step; groups of a GRPO step are of four."""
    rows: tuple[int, ...]
    """Of generation."""
    new_tokens: int
    capture_tokens: int
    """Of a batch; four batches are read."""


SHAPES: dict[ShapeName, Shape] = {
    "qwen2.5-7b": Shape(
        config=PUBLISHED_CONFIGS["Qwen/Qwen2.5-7B-Instruct"],
        layer=20,
        batch=32,
        rows=(32, 128, 512),
        new_tokens=64,
        capture_tokens=65_536,
    ),
    # The same script in seconds on a CPU.
    "small": Shape(
        config={
            **PUBLISHED_CONFIGS["Qwen/Qwen2.5-7B-Instruct"],
            "vocab_size": 4_200,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        layer=1,
        batch=4,
        rows=(4, 8),
        new_tokens=6,
        capture_tokens=512,
    ),
}


class Scene:
    """A base in memory with everything that a section needs; `base` and `config` describe it."""

    def __init__(self, shape: Shape, folder: Path, device: Literal["cpu", "cuda"]) -> None:
        """`folder`: for the base's configuration and tokenizer, and for what trainers write."""
        from transformers import AutoConfig

        self.shape, self.folder = shape, folder
        transformers_config = AutoConfig.for_model(**shape.config)
        self.config = _run_config(shape, folder, device)
        self.base = self.config.base
        shutil.copytree(
            base_folder(_EMBEDDED),
            self.base.model,
            ignore=shutil.ignore_patterns("*.safetensors", "config.json"),
        )
        transformers_config.save_pretrained(self.base.model)
        self.tokenizer = load_tokenizer(self.base)
        self.prompt: InjectionPrompt = build_injection_prompt(self.tokenizer, self.base.marker)
        self.device = torch_device(self.base)
        self.model: nn.Module = random_backbone(
            transformers_config, device=device, dtype=torch.bfloat16
        )
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id

    @property
    def d_model(self) -> int:
        """The base's width."""
        return self.shape.config["hidden_size"]

    def parameters(self, blocks: int | None = None) -> int:
        """Numbers that multiply a token: of all of the model, or of its first blocks."""
        whole = read_parameters(self.model)
        if blocks is None:
            return whole
        head = self.model.get_output_embeddings().weight.numel()
        return (whole - head) * blocks // self.shape.config["num_hidden_layers"]

    def activations(self, rows: int) -> Tensor:
        """Drawn ones: [rows, d_model] float32 on the CPU."""
        return torch.randn(rows, self.d_model, generator=torch.Generator().manual_seed(1))

    def labels(self, count: int) -> list[str]:
        """Drawn ones, of three bullets."""
        draw = random.Random(0)
        return [
            "\n".join(f"- {' '.join(draw.choices(_WORDS, k=_LABEL_WORDS // 3))}" for _ in range(3))
            for _ in range(count)
        ]

    def synchronize(self) -> None:
        """Wait until the card is done with what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes that tensors hold on the card; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def peak(self) -> int:
        """Most bytes that tensors held on the card since the last `forget_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def forget_peak(self) -> None:
        """Begin a new peak, from what is held now."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _run_config(shape: Shape, folder: Path, device: Literal["cpu", "cuda"]) -> RunConfig:
    """The 7B preset in one process on this base; each training is one step long."""
    config = preset("qwen2.5-7b")
    base = BaseConfig(
        model=str(folder / "base"),
        layer=shape.layer,
        injection_norm=150.0,
        dtype="bfloat16",
        training_dtype="bfloat16",
        device=device,
    )
    one_batch = {"batch_size": shape.batch, "epochs": 1}
    return dataclasses.replace(
        config,
        run_dir=str(folder / "run"),
        base=base,
        reward_scorer=dataclasses.replace(config.reward_scorer, **one_batch),
        sft=dataclasses.replace(config.sft, **one_batch),
        grpo=dataclasses.replace(
            config.grpo,
            steps=1,
            iterations=1,
            prompts_per_step=shape.batch // 4,
            group_size=4,
            micro_batch_size=shape.batch,
            max_new_tokens=shape.new_tokens,
            temperature=1.0,
        ),
        compute=dataclasses.replace(
            config.compute, trainer_workers=1, zero_stage=0, trainer_gpus=float(device == "cuda")
        ),
    )
