"""One forward for the part of a batch that all rows share.

Every verbalizer prompt begins with the same tokens, a third of a training row. Their keys and values are computed once and
attended by every row, gradients included; what comes out is what the plain forward would give. Knows nothing of trainers:
they call the model as ever. (The generation engine shares the prefix in its own way, without gradients.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nla_ray.models.backbone import causal_model


def share_prefix(model: nn.Module, prefix_ids: Sequence[int]) -> nn.Module:
    """Let the model compute `prefix_ids` once for a batch in which every row begins with them; returns the model.

    A call with another batch, with a cache, with embeddings instead of ids, or under gradient checkpointing (which has no
    caches) is computed as before.
    """
    decoder = causal_model(model).model
    plain, prefix = decoder.forward, torch.tensor([list(prefix_ids)])
    length = len(prefix_ids)

    def applies(input_ids: Tensor | None, attention_mask: Tensor | None, others: dict) -> bool:
        if input_ids is None or input_ids.shape[0] < 2 or input_ids.shape[1] <= length or not length:
            return False
        if others.get("past_key_values") is not None or others.get("position_ids") is not None or others.get("use_cache"):
            return False
        if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
            return False
        if attention_mask is not None and (attention_mask.ndim != 2 or not bool(attention_mask[:, :length].all())):
            return False
        return bool((input_ids[:, :length] == prefix.to(input_ids.device)).all())

    def forward(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **others):
        if not applies(input_ids, attention_mask, others):
            return plain(input_ids=input_ids, attention_mask=attention_mask, **others)
        others = {**others, "use_cache": True}
        shared = plain(input_ids=input_ids[:1, :length], **others)
        cache = shared.past_key_values
        cache.batch_repeat_interleave(len(input_ids))
        own = plain(input_ids=input_ids[:, length:], attention_mask=attention_mask, **{**others, "past_key_values": cache})
        own.last_hidden_state = torch.cat([shared.last_hidden_state.expand(len(input_ids), -1, -1), own.last_hidden_state], 1)
        own.past_key_values = None
        return own

    decoder.forward = forward
    return model
