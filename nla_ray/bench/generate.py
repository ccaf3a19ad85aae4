"""Generation: the engine against batched `model.generate` of the same adapter."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.activation.injection import activations_attached
from nla_ray.base.adapters import adapter_settings, adapter_state, load_adapter
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import InjectionPrompt, build_injection_prompt
from nla_ray.bench.models import predicting_parameters, with_random_adapter
from nla_ray.bench.timing import REPETITIONS, side_by_side, timed_ratio
from nla_ray.description.engines.interface import GenerationEngine, make_engine
from nla_ray.settings.config import RunConfig


def benchmark_generate(
    config: RunConfig,
    activations: Tensor,
    adapter_folder: str | None,
    repetitions: int = REPETITIONS,
) -> dict[str, Any]:
    """Greedy descriptions of the same activations [rows, d_model], by the engine and the library.

    The library's side goes through the embedding wrapper and the unmerged adapter. Without an
    adapter folder a random adapter is used. The share of rows with the same tokens is part of the
    result.
    """
    base, limit = config.base, config.grpo.max_new_tokens
    backbone, tokenizer = load_backbone(base), load_tokenizer(base)
    prompt = build_injection_prompt(tokenizer, base.marker)
    if adapter_folder is None:
        model = with_random_adapter(backbone, config)
    else:
        model = load_adapter(backbone, adapter_folder)
    model.eval()
    arguments = tokenizer, prompt, base.injection_norm, len(activations), adapter_settings(model)
    engine = make_engine(model, *arguments, chosen=base.engine)
    started = time.perf_counter()
    engine.load_weights(adapter_state(model), 1)
    load_seconds = time.perf_counter() - started
    ours = partial(_generate_ours, engine, activations, limit)
    library = partial(
        library_generate,
        model,
        tokenizer,
        prompt,
        activations,
        base.injection_norm,
        limit,
        engine.end_ids,
    )
    our_rows, library_rows = ours(), library()
    tokens, steps = sum(map(len, our_rows)), max(map(len, our_rows))
    same = sum(row == library_rows[index] for index, row in enumerate(our_rows))
    result = timed_ratio(*side_by_side(ours, library, repetitions), tokens)
    weights = predicting_parameters(model.get_base_model())
    return {
        **result,
        "tokens": tokens,
        "rows": len(our_rows),
        "same_rows": same / len(our_rows),
        "adapter": adapter_folder or "random",
        "longest": steps,
        "mean_length": tokens / len(our_rows),
        "weight_load_seconds": load_seconds,
        "sampled_tokens_per_second": _sampling_rate(engine, activations, limit),
        "flop": 2 * weights * tokens,
        "bytes": steps * weights * backbone.dtype.itemsize,
    }


def _generate_ours(
    engine: GenerationEngine, activations: Tensor, max_new_tokens: int
) -> list[list[int]]:
    rollouts = engine.generate(activations, max_new_tokens=max_new_tokens)
    return [rollout.token_ids for rollout in rollouts]


def _sampling_rate(engine: GenerationEngine, activations: Tensor, max_new_tokens: int) -> float:
    """Tokens a second at temperature 1, of one unrepeated run."""
    started = time.perf_counter()
    rollouts = engine.generate(activations, temperature=1.0, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - started
    return sum(rollout.num_sampled for rollout in rollouts) / seconds


def library_generate(
    model: nn.Module,
    tokenizer,
    prompt: InjectionPrompt,
    activations: Tensor,
    injection_norm: float,
    max_new_tokens: int,
    end_ids: frozenset[int],
    temperature: float = 0.0,
) -> list[list[int]]:
    """Tokens of `model.generate` for every activation, each row up to its end of text.

    Without `end_ids` all rows have `max_new_tokens`.
    """
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
            do_sample=temperature > 0.0,
            **({"temperature": temperature, "top_k": 0} if temperature else {}),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(
                {"eos_token_id": sorted(end_ids)} if end_ids else {"min_new_tokens": max_new_tokens}
            ),
        )
    return [_up_to_end(row, end_ids) for row in output[:, ids.shape[1] :].tolist()]


def _up_to_end(token_ids: list[int], end_ids: frozenset[int]) -> list[int]:
    """The ids up to the first end of text, which is kept."""
    for index, token_id in enumerate(token_ids):
        if token_id in end_ids:
            return token_ids[: index + 1]
    return token_ids
