"""Whether an engine generates what the base itself would: one activation, a few tokens.

Held against the library's whole forward with every adapter off, so that it also shows that the
plain base is what remains then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nla_ray.activation.injection import as_embeddings
from nla_ray.base.adapters import adapter_active
from nla_ray.base.families import causal_model, quantiser_of
from nla_ray.base.prompts import InjectionPrompt
from nla_ray.base.self_check import mismatch

if TYPE_CHECKING:
    from nla_ray.description.engines.interface import GenerationEngine

_NEW_TOKENS = 4
_TOLERANCE, _COARSE = 2e-2, 0.4
"""Of a log-probability, in nats, in float32 and in narrower types: more than the order of sums
changes, less than a mistake does."""
_BF16_STEP = 2.0**-8
"""To which share of itself a logit is right in bfloat16, as the library has it."""


@torch.no_grad()
def check_generation(
    engine: GenerationEngine, model: nn.Module, prompt: InjectionPrompt, injection_norm: float
) -> None:
    """Raise ValueError unless greedy tokens are the likeliest of the library's forward as well.

    `model`: what the engine was made from. The engine must hold no adapter.
    """
    causal: Any = causal_model(model)
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, prompt.num_vectors, causal.config.hidden_size, generator=draw)
    [written] = engine.generate(vectors, max_new_tokens=_NEW_TOKENS)
    ids = [*prompt.marked_ids, *written.token_ids]
    # Embeddings, not virtual ids: the base may have a trainer's activations attached.
    embedded = causal.get_input_embeddings()(torch.tensor([ids], device=causal.device)).clone()
    start = len(prompt.prefix_ids)
    embedded[0, start : start + prompt.num_vectors] = as_embeddings(
        vectors[0], injection_norm, like=embedded
    )
    with adapter_active(model, None):
        logits = causal(inputs_embeds=embedded).logits[0]
    expected = logits[len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
    chosen = expected.gather(-1, torch.tensor(written.token_ids)[:, None]).squeeze(-1)
    found = torch.tensor(written.log_probs)
    worst = max((found - chosen).abs().max(), (expected.amax(-1) - chosen).max()).item()
    tolerance = _tolerance(causal, logits)
    if not worst <= tolerance:  # nor a NaN
        likeliest = expected.argmax(-1).tolist()
        raise ValueError(
            mismatch(
                model,
                f"greedy tokens {written.token_ids} with log-probabilities"
                f" {[round(value, 3) for value in written.log_probs]}",
                f"{likeliest} with {[round(value, 3) for value in expected.amax(-1).tolist()]},"
                f" to {tolerance:.2g}",
                "Generate by another engine (--base.engine plain)",
            )
        )


def _tolerance(causal: Any, logits: Tensor) -> float:
    """Matrices of few bits may be multiplied in bfloat16 whatever the rest is computed in."""
    if causal.dtype == torch.float32 and quantiser_of(causal.config) is None:
        return _TOLERANCE
    return _COARSE + 2 * _BF16_STEP * logits.abs().amax().item()
