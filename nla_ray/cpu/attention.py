"""Attention for training in bfloat16 on a CPU, where query heads share keys and values.

The library's plain attention copies every key head for each of its query heads and multiplies head
by head; here the query heads of a key head are rows of one product. Same numbers and gradients,
half of the time (16 rows of 92 tokens on 129, 9 heads of 64 on 3: 7 ms forward and backward against
15).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUPED = "grouped"
"""Its name, as `load_backbone` takes it."""


def register_grouped() -> str:
    """Make the library know the attention below; returns its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, eager_mask)
    return GROUPED


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **ignored,
) -> tuple[Tensor, None]:
    """Attention in the form the library asks for it: -> ([batch, new, heads, dim], None).

    query [batch, heads, new, dim], key and value [batch, key heads, seq, dim], and an additive mask
    [batch or 1, 1, new, seq].
    """
    batch, heads, new, dim = query.shape
    key_heads, seq = key.shape[1:3]
    rows = heads // key_heads * new
    weights = torch.bmm(
        (query * scaling).reshape(batch * key_heads, rows, dim),
        key.reshape(batch * key_heads, seq, dim).transpose(1, 2),
    )
    weights = weights.view(batch, heads, new, seq)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(
        weights.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training
    )
    output = torch.bmm(
        weights.view(batch * key_heads, rows, seq), value.reshape(batch * key_heads, seq, dim)
    )
    return output.view(batch, heads, new, dim).transpose(1, 2).contiguous(), None
