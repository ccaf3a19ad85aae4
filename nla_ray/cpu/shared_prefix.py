"""What sequences share at their beginning is computed once.

In training every verbalizer prompt begins with the same tokens, a third of a row:
`decode_sharing_prefix` computes their keys and values once a batch, gradients included. In reading,
a description is scored after each of its lines, and cut short by the report: `pack` puts the
longest of such sequences into one row with the ends of the others, each of which sees its own
beginning and nothing else. What comes out is what the plain forward would give. (The generation
engine shares its prefix in its own way, without gradients.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def decode_sharing_prefix(
    decoder: nn.Module,
    prefix_ids: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The decoder's output [batch, seq, d_model] for ids [batch, seq], with `prefix_ids` computed
    once where every row begins with them.

    Another batch, or one under gradient checkpointing (which has no caches), is computed as it is.
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
    """Whether several rows [batch, seq] begin with prefix [1, length], go on after it, and see all
    of it."""
    rows, length = len(input_ids), prefix.shape[1]
    if not length or rows < 2 or input_ids.shape[1] <= length:
        return False
    if attention_mask is not None and (
        attention_mask.ndim != 2 or not bool(attention_mask[:, :length].all())
    ):
        return False
    return bool((input_ids[:, :length] == prefix).all())


# Sequences that begin alike in one row ------------------------------------------------------------


@dataclass(frozen=True)
class PackedRow:
    """One sequence whole, and what others add to a beginning of it.

    Example: of [7, 8, 9, 1] (number 0) and [7, 8, 1] (number 1): whole=0, ends=((1, 2),), length=5:
    the row 7 8 9 1 1.
    """

    whole: int
    ends: tuple[tuple[int, int], ...]
    """(number of the sequence, how many tokens it shares)."""
    length: int


_LONGEST_ROW = 2
"""A row's most tokens, in lengths of its longest sequence: rows of one batch are padded to the
longest of them."""


def share_beginnings(sequences: Sequence[Sequence[int]]) -> list[PackedRow]:
    """Rows that hold every sequence once; one joins a row when it shares at least half of itself
    with the row's longest, and there is room."""
    groups: list[list[int]] = []
    for number in sorted(range(len(sequences)), key=lambda number: sequences[number]):
        before = sequences[groups[-1][-1]] if groups else ()
        shared = _common(before, sequences[number])
        if shared and 2 * shared >= min(len(before), len(sequences[number])):
            groups[-1].append(number)
        else:
            groups.append([number])
    return [row for group in groups for row in _rows_of(sequences, group)]


def _rows_of(sequences: Sequence[Sequence[int]], group: Sequence[int]) -> list[PackedRow]:
    """The longest with what shares half of itself with it, then the longest of what is left, until
    nothing is."""
    rows: list[PackedRow] = []
    left = sorted(group, key=lambda number: len(sequences[number]), reverse=True)
    while left:
        whole, rest, ends = left[0], [], []
        length, longest = len(sequences[whole]), _LONGEST_ROW * len(sequences[whole])
        for number in left[1:]:
            size = len(sequences[number])
            same = min(_common(sequences[whole], sequences[number]), size - 1)
            if 2 * same >= size and length + size - same <= longest:
                ends.append((number, same))
                length += size - same
            else:
                rest.append(number)
        rows.append(PackedRow(whole, tuple(ends), length))
        left = rest
    return rows


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    return next(
        (place for place, (one, other) in enumerate(zip(first, second)) if one != other),
        min(len(first), len(second)),
    )


def pack(
    sequences: Sequence[Sequence[int]], rows: Sequence[PackedRow], pad_id: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[int, tuple[int, int]]]:
    """A batch of rows as a decoder takes it, and where the last token of each sequence stands:
    number -> (row, place).

    `input_ids`, `position_ids` [rows, length] and `attention_mask` [rows, 1, length, length], which
    is added to attention's weights in type `dtype`: 0 where a token sees another one.
    """
    length = max(row.length for row in rows)
    ids, positions = (
        torch.full((len(rows), length), pad_id),
        torch.zeros(len(rows), length, dtype=torch.long),
    )
    seen = (
        torch.eye(length, dtype=torch.bool).expand(len(rows), 1, -1, -1).clone()
    )  # padding sees itself: nothing at all gives NaN
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    last: dict[int, tuple[int, int]] = {}
    for place, row in enumerate(rows):
        start = 0
        for number, shared in ((row.whole, 0), *row.ends):
            own = torch.tensor(sequences[number][shared:])
            end = start + len(own)
            ids[place, start:end], positions[place, start:end] = (
                own,
                torch.arange(shared, shared + len(own)),
            )
            seen[place, 0, start:end, :shared] = True
            seen[place, 0, start:end, start:end] = causal[: len(own), : len(own)]
            last[number], start = (place, end - 1), end
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": hidden}, last
