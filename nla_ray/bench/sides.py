"""Speed, side by side with plain transformers, in one run: ratios, medians, and how far from what
the machine can do.

`capture`, `generate` and `step` (of GRPO) are measured here, ours and the library's by turns, so
that whatever else the machine does falls on both. `train` and `pipeline` are read from what those
stages recorded. Nothing here decides how a stage works.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from nla_ray.bench.timing import REPETITIONS, STEP_REPETITIONS, side_by_side, timed_ratio
from nla_ray.run.artifact import Run
from nla_ray.settings.config import RunConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import Trainer

    from nla_ray.base.prompts import InjectionPrompt


_ONE_STEP = {"save_strategy": "no", "logging_strategy": "no"}
"""A training run of one step leaves no checkpoint and no word."""
NUM_ROWS = 64
"""Activations described at once."""
CAPTURE_FLOP = 4e11
"""Work of one capture repetition: decides how many texts are read."""
MIN_TEXTS, MAX_TEXTS = 16, 1_024
LIBRARY_BATCH = 32
"""Texts in one batch of the reference: the order they come in, padded to the longest."""


# capture ------------------------------------------------------------------------------------------


def benchmark_capture(
    config: RunConfig, texts: Sequence[str], repetitions: int = REPETITIONS
) -> dict[str, Any]:
    """The capture stage's reader against the whole model with `output_hidden_states`, on the same
    texts in random order.

    Tokens are the texts' own, padding not counted. Raises RuntimeError when the two disagree on an
    activation.
    """
    import torch

    from nla_ray.activation.capture import ActivationReader, wanted_layers
    from nla_ray.activation.positions import TextEncoder
    from nla_ray.base.load import load_backbone, load_tokenizer

    base, layers = config.base, wanted_layers(config.base, config.capture)
    whole, tokenizer = load_backbone(base), load_tokenizer(base)
    encoder = TextEncoder(tokenizer, base, dataclasses.replace(config.capture, positions="last"))
    encoded = _enough_texts(
        encoder, texts, sum(parameter.numel() for parameter in whole.parameters())
    )
    cut = load_backbone(base, num_blocks=layers[-1] + 1)
    reader = ActivationReader(cut, layers, config.capture.batch_tokens)

    def ours() -> Tensor:
        return torch.cat([torch.from_numpy(array) for array in reader.read(encoded)[base.layer]])

    @torch.inference_mode()
    def library() -> Tensor:
        found = []
        for start in range(0, len(encoded), LIBRARY_BATCH):
            batch = tokenizer.pad(
                {"input_ids": [text.ids for text in encoded[start : start + LIBRARY_BATCH]]},
                return_tensors="pt",
            ).to(whole.device)
            states = whole(**batch, output_hidden_states=True).hidden_states[base.layer + 1]
            found.append(
                states[torch.arange(len(states)), batch["attention_mask"].sum(-1) - 1].float().cpu()
            )
        return torch.cat(found)

    error = (
        _relative_error(ours(), library())
        if base.layer + 1 < whole.config.num_hidden_layers
        else None
    )
    if error is not None and error > (1e-4 if base.dtype == "float32" else 5e-2):
        raise RuntimeError(
            f"capture benchmark: got activations that differ by {error:.1e} of their size, expected"
            " the same vectors."
        )
    tokens = sum(len(text.ids) for text in encoded)
    result = timed_ratio(*side_by_side(ours, library, repetitions), tokens)
    return {
        **result,
        "tokens": tokens,
        "texts": len(encoded),
        "layer": base.layer,
        "largest_relative_difference": error,
        "flop": 2 * tokens * _block_parameters(cut),
    }


def _enough_texts(encoder, texts: Sequence[str], parameters: int) -> list:
    """Texts in random order until their tokens mean CAPTURE_FLOP of work."""
    from nla_ray.activation.positions import Skipped

    encoded, tokens = [], 0
    for number, text in enumerate(random.Random(0).sample(list(texts), len(texts))):
        if len(encoded) >= MAX_TEXTS or (
            len(encoded) >= MIN_TEXTS and 2 * parameters * tokens > CAPTURE_FLOP
        ):
            break
        try:
            encoded.append(encoder.encode(str(number), text))
            tokens += len(encoded[-1].ids)
        except Skipped:
            continue
    return encoded


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _block_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token: matrices of the blocks and an output head, not the
    embedding table."""
    from nla_ray.base.families import family_of

    embedding = family_of(model).embedding
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and embedding not in name and ".lora_" not in name
    )


def _used_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token which is predicted: a tied output matrix is the
    embedding table once more."""
    return _block_parameters(model) + (
        model.config.tie_word_embeddings and model.get_input_embeddings().weight.numel()
    )


# generation ---------------------------------------------------------------------------------------


def benchmark_generate(
    config: RunConfig,
    activations: Tensor,
    adapter_folder: str | None,
    repetitions: int = REPETITIONS,
) -> dict[str, Any]:
    """The engine against batched `model.generate` through the embedding wrapper and the unmerged
    adapter, greedy, same rows.

    Without an adapter folder a random adapter is used. The share of rows with the same tokens is
    part of the result.
    """
    from nla_ray.base.adapters import adapter_settings, adapter_state, load_adapter
    from nla_ray.base.load import load_backbone, load_tokenizer
    from nla_ray.base.prompts import build_injection_prompt
    from nla_ray.description.engines.interface import make_engine

    base, limit = config.base, config.grpo.max_new_tokens
    model, tokenizer = load_backbone(base), load_tokenizer(base)
    prompt = build_injection_prompt(tokenizer, base.marker)
    model = (
        _with_random_adapter(model, config)
        if adapter_folder is None
        else load_adapter(model, adapter_folder)
    )
    model.eval()
    engine = make_engine(
        model, tokenizer, prompt, base.injection_norm, len(activations), adapter_settings(model)
    )
    started = time.perf_counter()
    engine.load_weights(adapter_state(model), 1)
    load_seconds = time.perf_counter() - started

    def ours() -> list[list[int]]:
        return [rollout.token_ids for rollout in engine.generate(activations, max_new_tokens=limit)]

    def library() -> list[list[int]]:
        return library_generate(
            model, tokenizer, prompt, activations, base.injection_norm, limit, engine.end_ids
        )

    own, theirs = ours(), library()
    tokens, steps = sum(map(len, own)), max(map(len, own))
    result = timed_ratio(*side_by_side(ours, library, repetitions), tokens)
    started = time.perf_counter()
    sampled = engine.generate(activations, temperature=1.0, max_new_tokens=limit)
    seconds = time.perf_counter() - started
    weights = _used_parameters(model.get_base_model())
    return {
        **result,
        "tokens": tokens,
        "rows": len(own),
        "same_rows": sum(a == b for a, b in zip(own, theirs)) / len(own),
        "adapter": adapter_folder or "random",
        "longest": steps,
        "mean_length": tokens / len(own),
        "weight_load_seconds": load_seconds,
        "sampled_tokens_per_second": sum(rollout.num_sampled for rollout in sampled) / seconds,
        "flop": 2 * weights * tokens,
        "bytes": steps * weights * engine.decoder.dtype.itemsize,
    }


def _with_random_adapter(model, config: RunConfig):
    """The model with an adapter of the configured rank that changes what it says."""
    import torch

    from nla_ray.base.adapters import adapter_state, add_lora, set_adapter_state

    model = add_lora(model, config.sft.lora, trainable=False)
    generator = torch.Generator().manual_seed(0)
    set_adapter_state(
        model,
        {
            name: torch.randn(value.shape, generator=generator) * 0.02
            for name, value in adapter_state(model).items()
        },
    )
    return model


def library_generate(
    model,
    tokenizer,
    prompt,
    activations: Tensor,
    injection_norm: float,
    max_new_tokens: int,
    end_ids: frozenset[int],
) -> list[list[int]]:
    """Greedy tokens of `model.generate` for every activation, each row up to its end of text."""
    import torch

    from nla_ray.activation.injection import activations_attached

    with (
        activations_attached(model.get_base_model(), activations, injection_norm) as wrapper,
        torch.inference_mode(),
    ):
        ids = torch.tensor(
            [prompt.encode(row, wrapper.vocab_size) for row in range(len(activations))],
            device=model.device,
        )
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(end_ids),
        )
    rows = output[:, ids.shape[1] :].tolist()
    return [
        row[: next((place + 1 for place, token in enumerate(row) if token in end_ids), len(row))]
        for row in rows
    ]


# a step of GRPO -----------------------------------------------------------------------------------


def benchmark_step(
    config: RunConfig,
    activations: Tensor,
    adapter_folder: str | None,
    folder: Path,
    repetitions: int = STEP_REPETITIONS,
) -> dict[str, Any]:
    """One step of GRPO (rollouts, log-probabilities, update) with the engine and this project's
    trainer, against TRL's own GRPOTrainer, which samples by `model.generate` and cannot inject: its
    prompt has the marker itself.

    The same base, adapter, groups and settings, credit to whole descriptions; on both sides every
    rollout goes on to the limit, so that both do the same work. Scoring is left out: the reward is
    a count. `folder`: for what the trainers write.
    """
    from nla_ray.base.load import load_tokenizer, torch_device
    from nla_ray.base.prompts import build_injection_prompt

    settings = dataclasses.replace(config.grpo, steps=1, iterations=1)
    compute = dataclasses.replace(
        config.compute,
        trainer_workers=1,
        zero_stage=0,
        trainer_gpus=float(torch_device(config.base).type == "cuda"),
    )
    config = dataclasses.replace(config, grpo=settings, compute=compute)
    prompt = build_injection_prompt(load_tokenizer(config.base), config.base.marker)
    adapter = adapter_folder or _save_random_adapter(config, folder / "adapter")
    rows = [number % len(activations) for number in range(settings.prompts_per_step)]
    ours = _our_trainer(config, activations[rows], adapter, folder / "ours", prompt)
    library = _library_trainer(config, adapter, folder / "library", prompt)
    rollouts = settings.prompts_per_step * settings.group_size
    result = timed_ratio(*side_by_side(ours.train, library.train, repetitions), rollouts)
    tokens = rollouts * settings.max_new_tokens
    # sampled once, read once by the frozen adapter for the KL, once by the policy, and once back
    passes = 4 if settings.beta else 3
    return {
        **result,
        "rollouts": rollouts,
        "tokens": tokens,
        "flop": 2 * _used_parameters(library.model.get_base_model()) * tokens * passes,
    }


def _distinct_tokens(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """A reward that costs nothing and differs within a group. Refuses rollouts that ended early:
    they are another work."""
    lengths = {len(ids) for ids in completion_ids}
    if len(lengths) != 1:
        raise RuntimeError(
            f"step benchmark: got rollouts of {min(lengths)} to {max(lengths)} tokens, expected one"
            " length."
        )
    return [float(len(set(ids))) for ids in completion_ids]


def _save_random_adapter(config: RunConfig, folder: Path) -> str:
    """A folder with a random adapter of the base."""
    from nla_ray.base.adapters import save_adapter
    from nla_ray.base.load import load_backbone

    save_adapter(_with_random_adapter(load_backbone(config.base), config), folder)
    return str(folder)


def _our_trainer(
    config: RunConfig,
    activations: Tensor,
    adapter_folder: str,
    folder: Path,
    prompt: InjectionPrompt,
) -> Trainer:
    """The stage's trainer, with an engine of its own in place of rollout actors."""
    from transformers import PrinterCallback

    from nla_ray.base.adapters import adapter_settings, adapter_state
    from nla_ray.base.load import load_backbone, load_tokenizer
    from nla_ray.description.engines.interface import make_engine
    from nla_ray.reinforce.grpo import VerbalizerTrainer, grpo_arguments, schedule_dataset
    from nla_ray.reinforce.rollouts import MAX_SLOTS, group_rows
    from nla_ray.reinforce.steps import StepClock
    from nla_ray.training.verbalizer import TrainableVerbalizer

    settings, tokenizer = config.grpo, load_tokenizer(config.base)
    model = TrainableVerbalizer.load(
        config.base, adapter_folder, activations, prompt, temperature=settings.temperature
    )
    engine = make_engine(
        load_backbone(config.base),
        tokenizer,
        prompt,
        config.base.injection_norm,
        MAX_SLOTS,
        adapter_settings(model),
    )
    engine.end_ids = frozenset()
    vocab_size, versions = model.get_input_embeddings().vocab_size, itertools.count(1)

    def sample(prompts: list[str], trainer: Trainer) -> dict[str, list]:
        rows, version = (
            group_rows([int(one) for one in prompts], settings.group_size),
            next(versions),
        )
        engine.load_weights(adapter_state(trainer.model), version)
        rollouts = engine.generate(
            activations[rows],
            group_size=settings.group_size,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=version,
        )
        return {
            "prompt_ids": [
                prompt.encode(row, vocab_size) for row in rows for _ in range(settings.group_size)
            ],
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.log_probs for rollout in rollouts],
        }

    trainer = VerbalizerTrainer(
        clock=StepClock(),
        credit="description",
        model=model,
        rollout_func=sample,
        reward_funcs=[_distinct_tokens],
        args=grpo_arguments(config, folder, [1.0], **_ONE_STEP),
        processing_class=tokenizer,
        train_dataset=schedule_dataset([list(range(settings.prompts_per_step))]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _library_trainer(
    config: RunConfig, adapter_folder: str, folder: Path, prompt: InjectionPrompt
) -> Trainer:
    """TRL's trainer as anyone would write it, with our precision."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from nla_ray.base.adapters import load_adapter
    from nla_ray.base.load import computes_in_bf16, load_backbone, load_tokenizer
    from nla_ray.reinforce.grpo import grpo_arguments
    from nla_ray.training.verbalizer import TrainableVerbalizer

    tokenizer, limit = load_tokenizer(config.base), config.grpo.max_new_tokens
    text = tokenizer.decode([*prompt.prefix_ids, prompt.marker_id, *prompt.suffix_ids])
    wrap = partial(TrainableVerbalizer, in_bf16=computes_in_bf16(config.base))
    model = load_adapter(load_backbone(config.base), adapter_folder, trainable=True, wrap=wrap)
    model.scores_labels = False
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[_distinct_tokens],
        args=grpo_arguments(
            config, folder, [1.0], **_ONE_STEP, generation_kwargs={"min_new_tokens": limit}
        ),
        train_dataset=Dataset.from_dict({"prompt": [text] * config.grpo.prompts_per_step}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_texts(run: Run) -> list[str]:
    """Texts of the test split, in the corpus's order."""
    from nla_ray.text.stage import read_chunks

    texts = [
        row["text"]
        for row in read_chunks(run, ("split", "text")).to_pylist()
        if row["split"] == "test"
    ]
    if len(texts) < NUM_ROWS:
        raise ValueError(
            f"benchmark: got {len(texts)} test texts, expected at least {NUM_ROWS}. Use a larger"
            " corpus (--corpus.max-chunks) in another --run-dir."
        )
    return texts


def read_activations(config: RunConfig, texts: Sequence[str]) -> Tensor:
    """Activations [NUM_ROWS, d_model] of texts in random order."""
    import torch

    from nla_ray.activation.capture import ActivationReader
    from nla_ray.activation.positions import Skipped, TextEncoder
    from nla_ray.base.load import load_backbone, load_tokenizer

    base = config.base
    encoder = TextEncoder(
        load_tokenizer(base), base, dataclasses.replace(config.capture, positions="last")
    )
    encoded = []
    for number, text in enumerate(random.Random(1).sample(list(texts), len(texts))):
        try:
            encoded.append(encoder.encode(str(number), text))
        except Skipped:
            continue
        if len(encoded) == NUM_ROWS:
            break
    reader = ActivationReader(
        load_backbone(base, num_blocks=base.layer + 1), [base.layer], config.capture.batch_tokens
    )
    return torch.cat([torch.from_numpy(array) for array in reader.read(encoded)[base.layer]])
