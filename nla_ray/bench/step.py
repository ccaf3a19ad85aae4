"""A step of GRPO: this project's trainer and engine against TRL's GRPOTrainer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from trl import GRPOTrainer

from nla_ray.base.adapters import adapter_settings, adapter_state, load_adapter
from nla_ray.base.load import computes_in_bf16, load_backbone, load_tokenizer, torch_device
from nla_ray.base.prompts import InjectionPrompt, build_injection_prompt
from nla_ray.bench.models import predicting_parameters, save_random_adapter
from nla_ray.bench.timing import STEP_REPETITIONS, side_by_side, timed_ratio
from nla_ray.description.engines.interface import GenerationEngine, make_engine
from nla_ray.reinforce.grpo import VerbalizerTrainer, grpo_arguments, schedule_dataset
from nla_ray.reinforce.rollouts import MAX_SLOTS, group_rows
from nla_ray.reinforce.steps import StepClock
from nla_ray.settings.config import GRPOSettings, RunConfig
from nla_ray.training.verbalizer import TrainableVerbalizer

_ONE_STEP = {"save_strategy": "no", "logging_strategy": "no"}
"""A training run of one step leaves no checkpoint and no line of a log."""


def benchmark_step(
    config: RunConfig,
    activations: Tensor,
    adapter_folder: str | None,
    folder: Path,
    repetitions: int = STEP_REPETITIONS,
) -> dict[str, Any]:
    """One step of GRPO (rollouts, log-probabilities, update) on both sides.

    TRL's side samples by `model.generate`. It cannot inject: its prompt has the marker itself. The
    base, adapter, groups and settings are the same, with credit to whole descriptions. On both
    sides every rollout goes on to the limit, so that both do the same work. Scoring is left out:
    the reward is a count. `activations` [rows, d_model]; `folder`: for what the trainers write.
    """
    settings = dataclasses.replace(config.grpo, steps=1, iterations=1)
    compute = dataclasses.replace(
        config.compute,
        trainer_workers=1,
        zero_stage=0,
        trainer_gpus=float(torch_device(config.base).type == "cuda"),
    )
    config = dataclasses.replace(config, grpo=settings, compute=compute)
    prompt = build_injection_prompt(load_tokenizer(config.base), config.base.marker)
    adapter = adapter_folder or save_random_adapter(config, folder / "adapter")
    rows = [number % len(activations) for number in range(settings.prompts_per_step)]
    policy = TrainableVerbalizer.load(
        config.base, adapter, activations[rows], prompt, temperature=settings.temperature
    )
    ours = engine_trainer(
        config,
        policy,
        activations[rows],
        folder / "ours",
        prompt,
        load_backbone(config.base),
        logging_strategy="no",
    )
    library = _library_trainer(config, adapter, folder / "library", prompt)
    rollouts = settings.prompts_per_step * settings.group_size
    result = timed_ratio(*side_by_side(ours.train, library.train, repetitions), rollouts)
    tokens = rollouts * settings.max_new_tokens
    # Sampled once, read once by the frozen adapter for the KL, once by the policy, and once back.
    passes = 4 if settings.beta else 3
    weights = predicting_parameters(library.model.get_base_model())
    return {**result, "rollouts": rollouts, "tokens": tokens, "flop": 2 * weights * tokens * passes}


def _distinct_tokens(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """A reward that costs nothing and differs within a group.

    Raises RuntimeError for rollouts that ended early: they are less work.
    """
    lengths = {len(ids) for ids in completion_ids}
    if len(lengths) != 1:
        raise RuntimeError(
            f"step benchmark: got rollouts of {min(lengths)} to {max(lengths)} tokens, expected one"
            " length."
        )
    return [float(len(set(ids))) for ids in completion_ids]


class EngineSampler:
    """TRL's `rollout_func` with an engine in this process; rollouts never end before the limit."""

    def __init__(
        self,
        engine: GenerationEngine,
        activations: Tensor,
        prompt: InjectionPrompt,
        vocab_size: int,
        settings: GRPOSettings,
    ) -> None:
        """`activations`: the bank, [rows, d_model]."""
        engine.end_ids = frozenset()
        self._engine, self._activations, self._settings = engine, activations, settings
        self._prompt, self._vocab_size = prompt, vocab_size
        self._versions = itertools.count(1)

    def __call__(self, prompts: list[str], trainer: Trainer) -> dict[str, list]:
        """Rollouts of the groups, under the trainer's adapter of this moment."""
        size, version = self._settings.group_size, next(self._versions)
        rows = group_rows([int(prompt) for prompt in prompts], size)
        self._engine.load_weights(adapter_state(trainer.model), version)
        rollouts = self._engine.generate(
            self._activations[rows],
            group_size=size,
            temperature=self._settings.temperature,
            max_new_tokens=self._settings.max_new_tokens,
            seed=version,
        )
        encoded = [self._prompt.encode(row, self._vocab_size) for row in rows]
        return {
            "prompt_ids": [ids for ids in encoded for _ in range(size)],
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.log_probs for rollout in rollouts],
        }


def engine_trainer(
    config: RunConfig,
    model: TrainableVerbalizer,
    activations: Tensor,
    folder: Path,
    prompt: InjectionPrompt,
    backbone: nn.Module,
    **overrides: Any,
) -> Trainer:
    """The stage's trainer, with an engine in this process in place of rollout actors.

    `backbone`: the base that the engine reads. `overrides`: of TRL's fields.
    """
    base, settings, tokenizer = config.base, config.grpo, load_tokenizer(config.base)
    lora, vocab_size = adapter_settings(model), model.get_input_embeddings().num_embeddings
    engine = make_engine(
        backbone, tokenizer, prompt, base.injection_norm, MAX_SLOTS, lora, chosen=base.engine
    )
    trainer = VerbalizerTrainer(
        clock=StepClock(),
        credit="description",
        model=model,
        rollout_func=EngineSampler(engine, activations, prompt, vocab_size, settings),
        reward_funcs=[_distinct_tokens],
        args=grpo_arguments(config, folder, [1.0], save_strategy="no", **overrides),
        processing_class=tokenizer,
        train_dataset=schedule_dataset([list(range(settings.prompts_per_step))]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _library_trainer(
    config: RunConfig, adapter_folder: str, folder: Path, prompt: InjectionPrompt
) -> Trainer:
    """TRL's trainer as anyone would write it, with our precision."""
    tokenizer, limit = load_tokenizer(config.base), config.grpo.max_new_tokens
    text = tokenizer.decode(prompt.marked_ids)
    wrap = partial(TrainableVerbalizer, in_bf16=computes_in_bf16(config.base))
    model = load_adapter(load_backbone(config.base), adapter_folder, trainable=True, wrap=wrap)
    model.scores_labels = False
    to_the_limit = {"generation_kwargs": {"min_new_tokens": limit}}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[_distinct_tokens],
        args=grpo_arguments(config, folder, [1.0], **_ONE_STEP, **to_the_limit),
        train_dataset=Dataset.from_dict({"prompt": [text] * config.grpo.prompts_per_step}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
