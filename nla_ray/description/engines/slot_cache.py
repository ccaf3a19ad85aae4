"""Keys, values and visibility of the rows that a slot engine decodes, and a step of all of them.

Knows neither who waits nor what a row is for. Protects the rule that a row sees its own tokens and
the common prefix alone, whatever the other slots hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from nla_ray.description.engines.decoder import Decoder, KeysValues
from nla_ray.description.engines.graphed import GraphedStep
from nla_ray.description.sampling import Sampler, choose_each


class SlotCache:
    """Keys, values, visibility and last tokens of the rows that are being decoded.

    The first columns hold a row's own tokens of the prompt, from the injected ones on; the rest is
    a ring that one step fills at one column for all rows. A row lives at most `ring` steps, so a
    column is never overwritten while its row needs it.
    """

    def __init__(self, decoder: Decoder, slots: int, suffix: int, ring: int, prefix: int) -> None:
        """`suffix`: most tokens of a row's prompt from the first injected one on. `ring`: of steps.

        `prefix`: tokens before those.
        """
        shape = decoder.shape
        self._cache = KeysValues.empty(
            shape, slots, suffix + ring, dtype=decoder.dtype, device=decoder.device
        )
        self._hidden = torch.full(
            (slots, shape.groups, 1, suffix + ring),
            -torch.inf,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self.count, self.suffix, self.ring, self._steps = slots, suffix, ring, 0
        self._decoder, self._prefix = decoder, prefix
        self._places = decoder.places(prefix + suffix + ring + 1)
        self._tokens, self._keys, self._ages, self._starts = (
            torch.zeros(slots, dtype=torch.int64, device=decoder.device) for _ in range(4)
        )
        """Of each row: its last token, its key, its tokens so far, and the last position of its
        prompt."""
        self._column = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self._recording: tuple[Sampler, Callable[[], tuple[Tensor, Tensor]]] | None = None

    def record(self, prefix: KeysValues, sampler: Sampler) -> None:
        """Have steps of all slots under one sampler replayed from now on.

        Where there are no graphs, they are called. The slots must be clear, and are.
        """
        if self._recording is None or self._recording[0] is not sampler:
            self._column.fill_(self.suffix)
            step = partial(self._step_all, prefix, sampler)
            self._recording = sampler, GraphedStep(step) if self._tokens.is_cuda else step
            self.clear()

    def forget_recording(self) -> None:
        """What was recorded read weights that are gone."""
        self._recording = None

    def step(self, prefix: KeysValues, samplers: Sequence[Sampler]) -> tuple[Tensor, Tensor]:
        """Decode one token for the first rows, by a sampler each: tokens and log-probabilities."""
        active, recorded = len(samplers), self._recording
        if recorded is not None and all(sampler is recorded[0] for sampler in samplers):
            self._column.fill_(self._next_column())
            tokens, log_probs = recorded[1]()
            return tokens[:active], log_probs[:active]
        cache, column, hidden = self._advance(active)
        choose = partial(choose_each, samplers)
        return self._decode(active, cache, column, hidden, prefix, choose)

    def _step_all(self, prefix: KeysValues, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """A step of all slots over all columns: the same tensors and shapes every time."""
        self._hidden.index_fill_(-1, self._column, 0)
        hidden = self._hidden.flatten(0, 1)
        return self._decode(self.count, self._cache, self._column, hidden, prefix, sampler.choose)

    def _decode(
        self,
        rows: int,
        cache: KeysValues,
        column: int | Tensor,
        hidden: Tensor,
        prefix: KeysValues,
        choose: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        tokens, ages, decoder = self._tokens[:rows], self._ages[:rows], self._decoder
        # Slots that nobody holds grow older than any row.
        positions = (ages + self._starts[:rows]).clamp_(max=len(self._places) - 1)
        places = self._places[positions]
        stream = decoder.step(decoder.embed(tokens), places, cache, column, hidden, prefix)
        chosen, log_probs = choose(decoder.logits(stream), self._keys[:rows], ages)
        tokens.copy_(chosen)
        ages.add_(1)
        return chosen, log_probs

    def clear(self) -> None:
        """Forget every row; what the cache holds is out of sight and finite."""
        self._steps = 0
        self._hidden.fill_(-torch.inf)

    def fill(
        self,
        slots: Sequence[int],
        chunk: KeysValues,
        members: Sequence[int],
        states: Sequence[tuple[int, int, int]],
    ) -> None:
        """Give slots the rows of members of a prefilled chunk: their tokens of the prompt.

        `states`: the last token, the key and the number of tokens so far of each. What the slots
        held before is out of sight.
        """
        device, width = self._hidden.device, chunk.keys.shape[3]
        target, source = (torch.tensor(part, device=device) for part in (slots, members))
        self._cache.keys[:, target, :, :width] = chunk.keys[:, source]
        self._cache.values[:, target, :, :width] = chunk.values[:, source]
        self._hidden[target] = -torch.inf
        self._hidden[target, ..., :width] = 0
        columns = torch.tensor(states, device=device).unbind(1)
        for held, column in zip((self._tokens, self._keys, self._ages), columns, strict=True):
            held[target] = column
        self._starts[target] = self._prefix + width - 1

    def move(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`."""
        used = self._window
        for tensor in (self._cache.keys, self._cache.values):
            tensor[:, target, :, :used] = tensor[:, source, :, :used]
        for state in (self._hidden, self._tokens, self._keys, self._ages, self._starts):
            state[target] = state[source]

    def take_over(self, other: SlotCache, rows: int) -> None:
        """Go on with the first rows of other slots, none of which lives longer than this ring.

        Columns of the ring come in the order in which they were filled, so that the oldest one is
        overwritten first.
        """
        kept, width = min(other._steps, other.ring, self.ring), min(other.suffix, self.suffix)
        filled = range(other._steps - kept, other._steps)
        device = self._hidden.device
        source = torch.tensor(
            [*range(width), *(other.suffix + step % other.ring for step in filled)], device=device
        )
        target = torch.tensor(
            [*range(width), *range(self.suffix, self.suffix + kept)], device=device
        )
        for ours, theirs in (
            (self._cache.keys, other._cache.keys),
            (self._cache.values, other._cache.values),
        ):
            ours[:, :rows].index_copy_(3, target, theirs[:, :rows].index_select(3, source))
        seen = other._hidden[:rows].index_select(3, source)
        self._hidden[:rows].index_copy_(3, target, seen)
        for ours, theirs in (
            (self._tokens, other._tokens),
            (self._keys, other._keys),
            (self._ages, other._ages),
            (self._starts, other._starts),
        ):
            ours[:rows] = theirs[:rows]
        self._steps = kept

    @property
    def _window(self) -> int:
        """Columns that may hold something: all of them once the ring has come round."""
        return self.suffix + min(self._steps, self.ring)

    def _next_column(self) -> int:
        column = self.suffix + self._steps % self.ring
        self._steps += 1
        return column

    def _advance(self, active: int) -> tuple[KeysValues, int, Tensor]:
        """Open the next column to the active rows.

        Returns their cache up to the last used column, the column, and the mask.
        """
        column = self._next_column()
        self._hidden[:active, ..., column] = 0
        window = self._window
        cache = KeysValues(
            self._cache.keys[:, :active, :, :window], self._cache.values[:, :active, :, :window]
        )
        return cache, column, self._hidden[:active, ..., :window].flatten(0, 1)
