"""What every prompt of a batch begins with is computed once.

In training every verbalizer prompt begins with the same tokens, a third of a row:
`decode_sharing_prefix` computes their keys and values once a batch, gradients included. What comes
out is what the plain forward would give. (The generation engine shares its prefix in its own way,
without gradients.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def decode_sharing_prefix(
    decoder: nn.Module,
    prefix_ids: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The decoder's output [batch, seq, d_model] for ids [batch, seq] that begin with `prefix_ids`.

    The prefix is computed once. A batch in which a row begins otherwise, or one under gradient
    checkpointing (which has no caches), is computed as it is.
    """
    prefix = torch.tensor([list(prefix_ids)], dtype=torch.long, device=input_ids.device)
    checkpoints = getattr(decoder, "gradient_checkpointing", False) and decoder.training
    if checkpoints or not _all_begin_with(prefix, input_ids, attention_mask):
        return decoder(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
    rows, length = len(input_ids), prefix.shape[1]
    shared = decoder(input_ids=input_ids[:1, :length], use_cache=True)
    cache = shared.past_key_values
    cache.batch_repeat_interleave(rows)
    ends = decoder(
        input_ids=input_ids[:, length:],
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([shared.last_hidden_state.expand(rows, -1, -1), ends.last_hidden_state], dim=1)


def _all_begin_with(prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether several rows [batch, seq] begin with prefix [1, length].

    They must also go on after it, and see all of it.
    """
    rows, length = len(input_ids), prefix.shape[1]
    if not length or rows < 2 or input_ids.shape[1] <= length:
        return False
    if attention_mask is not None and (
        attention_mask.ndim != 2 or not bool(attention_mask[:, :length].all())
    ):
        return False
    return bool((input_ids[:, :length] == prefix).all())
