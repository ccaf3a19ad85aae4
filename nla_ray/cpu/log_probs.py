"""Log-probabilities of completions, computed only where they are asked for.

TRL asks a model for them with `fused_lm_head=True`. Its own answer is made for GPUs; on a CPU it
projects every position onto the vocabulary, prompt and padding included, in chunks of many passes.
Here only the labelled tokens meet the output matrix: the same numbers and gradients. Together with
the shared prefix of the prompts an update of preset nano takes 0.6 of the time. Knows nothing of
TRL's trainers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from nla_ray.cpu.projection import products_in_bf16


@dataclass
class TokenLogProbs(ModelOutput):
    """What TRL reads of such a forward; both [batch, seq - 1], zero where the label is -100."""

    log_probs: Tensor | None = None
    """Of token t + 1 given what stands before it, at temperature."""
    entropy: Tensor | None = None
    """Of the distribution that it is drawn from, in nats; without gradient. None where it is not
    asked for."""


def score_labels(
    stream: Tensor,
    output_matrix: nn.Module,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    finish: Callable[[Tensor], Tensor] | None = None,
    with_entropy: bool,
) -> TokenLogProbs:
    """Log-probs of the labelled tokens, from the decoder's output.

    stream [batch, seq, d_model], output_matrix: d_model -> vocabulary, labels [batch, seq] with
    -100 where nothing is asked. `finish`: what the base does to its logits.
    """
    targets = labels[:, 1:]
    wanted = targets != -100
    logits = _float32_logits(stream[:, :-1][wanted], output_matrix.weight)
    logits = logits if finish is None else finish(logits)
    log_probs = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, targets[wanted].unsqueeze(-1)).squeeze(-1)
    zeros = chosen.new_zeros(wanted.shape)
    answer = TokenLogProbs(log_probs=zeros.masked_scatter(wanted, chosen))
    if with_entropy:
        with torch.no_grad():
            answer.entropy = zeros.masked_scatter(wanted, -(log_probs.exp() * log_probs).sum(-1))
    return answer


def _float32_logits(stream: Tensor, weight: Tensor) -> Tensor:
    """W x in float32, whatever the rest is computed in: [n, d_model] -> [n, vocab].

    A logit of 20 in bfloat16 is right to 0.06 only, and the sampler's are float32.
    """
    if weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return F.linear(stream, weight)
    return _NarrowProducts.apply(stream, weight)


class _NarrowProducts(torch.autograd.Function):
    """W x: products of bfloat16 numbers, added up and returned in float32."""

    @staticmethod
    def forward(ctx, stream: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = stream.dtype
        with torch.autocast("cpu", enabled=False), products_in_bf16():
            return F.linear(stream.float(), weight.float())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """The weight is frozen."""
        (weight,) = ctx.saved_tensors
        return (gradient.bfloat16() @ weight.bfloat16()).to(ctx.dtype), None
