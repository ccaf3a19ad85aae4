"""Patch-back: a vector in place of the activation, and how far it changes what the base says next.

It is causal, and independent of any cosine: the base itself judges what a reconstruction holds.
Knows the base and vectors; nothing of descriptions, scorers or run directories. Protects the rule
that the clean run is a patched run too, with the activation itself: whatever rounding the base's
type brings, both have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nla_ray.activation.vectors import direction, norm
from nla_ray.base.layers import ResidualWriter

_CAPTURE_TOLERANCE = 0.05
"""Share of |v| by which the base's own stream may differ from the captured activation: rounding of
bfloat16 in batches of another shape. Another prompt or another base differs by more."""


class Drifted(ValueError):
    """A prompt after which the base's stream is not the activation that was captured."""


@dataclass(frozen=True, kw_only=True)
class Patched:
    """What the base says next with each of n vectors in place of one activation.

    Example, a vector that changes nothing and one that does: divergence=[0.0, 2.31],
    keeps_top=[True, False]
    """

    divergence: Float[Tensor, " n"]
    """KL(clean || patched) of the next token's distribution, in nats."""
    keeps_top: Bool[Tensor, " n"]
    """Whether the likeliest token is that of the clean run."""


def at_norm_of(
    directions: Float[Tensor, "*#batch d_model"], activation: Float[Tensor, "*#batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Vectors with the length of the activation in whose place they are put."""
    return direction(directions) * norm(activation)


class Patcher:
    """A whole base, and the layer at which vectors are put into it."""

    def __init__(self, model, layer: int) -> None:
        self._writer, self._device = ResidualWriter(model, layer), model.device

    @torch.inference_mode()
    def patch(
        self,
        ids: Sequence[int],
        activation: Float[Tensor, " d_model"],
        replacements: Float[Tensor, "n d_model"],
    ) -> Patched:
        """Each replacement, as it is, in place of the activation at the last of `ids`.

        Equal vectors are put in once, so that what they lead to is equal to the last digit.
        Raises Drifted where the base's own stream there is not the activation.
        """
        stream, before = self._writer.read(torch.tensor(ids, device=self._device))
        difference = norm(stream.float().cpu() - activation) / norm(activation)
        if difference.item() > _CAPTURE_TOLERANCE:
            raise Drifted(
                f"patch-back: got a residual stream that differs by {difference.item():.0%} of its"
                f" length from the captured activation, expected at most {_CAPTURE_TOLERANCE:.0%}."
                " The base, its tokenizer or its chat template reads the text otherwise than at"
                " capture; capture activations again."
            )
        written, index = torch.cat([activation[None], replacements]).unique(
            dim=0, return_inverse=True
        )
        log_probs = self._writer.next_logits(written, before).log_softmax(-1)
        clean = log_probs[index[0]]
        divergence = (clean.exp() * (clean - log_probs)).sum(-1).cpu()
        keeps_top = (log_probs.argmax(-1) == clean.argmax(-1)).cpu()
        return Patched(divergence=divergence[index[1:]], keeps_top=keeps_top[index[1:]])
