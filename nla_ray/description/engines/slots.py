"""The generation engine: activations -> sampled descriptions, with their log-probabilities.

Rollouts, evaluation and serving call this plain class, which knows nothing of Ray. What it
exploits: every prompt is the same up to the injected token. The life of one `generate` call:

1. The prefix's keys and values are there already, computed once per weight version and shared by
   all rows.
2. A chunk of activations is prefilled: injected token + suffix, once per activation. Its last
   logits give the first token of every rollout of the group.
3. Rollouts take slots; each slot holds a copy of the suffix's keys and values, then the rollout's
   own.
4. A step decodes one token for all slots. Keys of one step go to ONE column of the cache, whatever
   each row's length; a mask says which columns belong to a row. Rotary positions are inside the
   keys, so columns may lie in any order.
5. A finished row gives its slot to a waiting rollout, or, when none waits, to the last active row:
   the active rows are always the first ones, and the batch shrinks. On a GPU it does not: there a
   step of all slots over all columns is recorded once and replayed.

Protects two rules: greedy output equals the model's own `generate`, token for token; results do not
depend on slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nla_ray.activation.injection import as_embeddings
from nla_ray.base.prompts import InjectionPrompt, LayerEnding
from nla_ray.description.engines.decoder import Decoder, KeysValues, empty_prefix
from nla_ray.description.engines.graphed import GraphedStep
from nla_ray.description.engines.requests import (
    GenerationCancelled,
    check_log_probs,
    check_request,
    check_slots,
    never,
    scaling_of,
)
from nla_ray.description.record import Description
from nla_ray.description.sampling import Sampler, rollout_keys
from nla_ray.settings.config import LoraSettings


@dataclass(kw_only=True)
class _Draft:
    """A rollout in the making."""

    index: int
    """In the result: activation * group_size + sample."""
    key: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False


class SlotEngine:
    """A `GenerationEngine` by a decoder, which shares the prompt's prefix among all rows."""

    def __init__(
        self,
        decoder: Decoder,
        end_ids: frozenset[int],
        tokenizer,
        prompt: InjectionPrompt,
        injection_norm: float,
        max_slots: int = 64,
        lora: LoraSettings | None = None,
        *,
        recorded: bool | None = None,
    ) -> None:
        """`end_ids`: end a description. The others as `make_engine` takes them.

        `recorded`: whether steps are replayed from a CUDA graph; None: on a GPU, where the decoder
        can be.
        """
        check_slots(max_slots)
        self.tokenizer, self.prompt, self.injection_norm, self.max_slots = (
            tokenizer,
            prompt,
            injection_norm,
            max_slots,
        )
        self._ending = LayerEnding(suffix_ids=prompt.suffix_ids, injection_norm=injection_norm)
        self.end_ids, self.decoder = end_ids, decoder
        is_on_gpu = decoder.device.type == "cuda"
        self._records = is_on_gpu and decoder.can_be_recorded if recorded is None else recorded
        self._lora = lora
        self._sampler = Sampler(self.decoder.shape.vocab_size, 0.0, self.decoder.device)
        self._idle: dict[tuple[int, int, int], _Slots] = {}
        """The last call's slots, by their size: a cache of the same size is not allocated again."""
        self.load_weights(None, 0)

    def load_weights(self, adapter_state: Mapping[str, Tensor] | None, version: int) -> None:
        """Use these adapter weights from now on; None: the plain base."""
        scaling = scaling_of(self._lora, adapter_state)
        with torch.inference_mode():
            stays = self.decoder.load(adapter_state, scaling)
            ids = torch.tensor([self.prompt.prefix_ids], device=self.decoder.device)
            _, prefix = self.decoder.prefill(self.decoder.embed(ids), empty_prefix(self.decoder))
            if stays:
                self.prefix.keys.copy_(prefix.keys)
                self.prefix.values.copy_(prefix.values)
            else:
                self.prefix = prefix
                for slots in self._idle.values():
                    slots.forget_recording()
        self.weight_version = version

    @torch.inference_mode()
    def generate(
        self,
        activations: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ending: LayerEnding | None = None,
        is_cancelled: Callable[[], bool] = never,
    ) -> list[Description]:
        """`group_size` descriptions of each activation, as `GenerationEngine` says."""
        rows = list(range(len(activations))) if rows is None else list(rows)
        ending = ending or self._ending
        injected = check_request(
            torch.as_tensor(activations),
            rows,
            group_size,
            max_new_tokens,
            d_model=self.decoder.d_model,
            prompt=ending.of(self.prompt),
            context=self.decoder.shape.max_positions,
        )
        if not rows:
            return []
        samples = list(range(group_size)) * len(rows)
        keys = rollout_keys(
            seed, [row for row in rows for _ in range(group_size)], samples
        ).tolist()
        drafts = [_Draft(index=index, key=key) for index, key in enumerate(keys)]
        if temperature != self._sampler.temperature:
            self._sampler = Sampler(self.decoder.shape.vocab_size, temperature, self.decoder.device)
        own = injected.shape[1] + len(ending.suffix_ids)
        size = min(self.max_slots, len(drafts)), own, max(1, max_new_tokens - 1)
        slots = self._idle.pop(size, None) or _Slots(self.decoder, self.prompt, *size)
        if self._records:
            slots.record(self.prefix, self._sampler)
        prefill = partial(self.prefill, ending=ending)
        generation = _Generation(
            self, prefill, injected, drafts, group_size, max_new_tokens, slots, is_cancelled
        )
        try:
            generation.run()
        finally:
            slots.clear()
            self._idle = {size: slots}
        return self._descriptions(drafts, rows, group_size)

    def _descriptions(
        self, drafts: Sequence[_Draft], rows: Sequence[int], group_size: int
    ) -> list[Description]:
        texts = self.tokenizer.batch_decode(
            [draft.token_ids for draft in drafts],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [
            Description.from_sample(
                row=rows[draft.index // group_size],
                token_ids=draft.token_ids,
                log_probs=draft.log_probs,
                written=written,
                finished=draft.finished,
                weight_version=self.weight_version,
            )
            for draft, written in zip(drafts, texts, strict=True)
        ]

    def prefill(
        self, vectors: Tensor, ending: LayerEnding | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Injected tokens and suffix -> last logits, and keys and values.

        [n, vectors, d_model] -> [n, vocab], and n rows. `ending`: as `generate` takes it.
        """
        decoder, ending = self.decoder, ending or self._ending
        suffix = decoder.embed(torch.tensor(ending.suffix_ids, device=decoder.device))
        injected = as_embeddings(vectors.to(decoder.device), ending.injection_norm, like=suffix)
        embedded = torch.cat([injected, suffix.expand(len(vectors), -1, -1)], 1)
        stream, keys_values = decoder.prefill(embedded, self.prefix)
        return decoder.logits(stream), keys_values


class _Slots:
    """Keys, values, visibility and last tokens of the rows that are being decoded.

    The first columns hold a row's own tokens of the prompt, from the injected ones on; the rest is
    a ring that one step fills at one column for all rows. A row lives at most `ring` steps, so a
    column is never overwritten while its row needs it.
    """

    def __init__(
        self, decoder: Decoder, prompt: InjectionPrompt, slots: int, suffix: int, ring: int
    ) -> None:
        """`suffix`: tokens of the prompt from the first injected one on. `ring`: of steps."""
        shape, length = decoder.shape, len(prompt.prefix_ids) + suffix
        self._cache = KeysValues.empty(
            shape, slots, suffix + ring, dtype=decoder.dtype, device=decoder.device
        )
        self._hidden = torch.full(
            (slots, shape.groups, 1, suffix + ring),
            -torch.inf,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self.count, self._suffix, self._ring, self._steps = slots, suffix, ring, 0
        self._decoder, self._prompt_length = decoder, length
        self._places = decoder.places(length + ring + 1)
        self.tokens, self.keys, self.ages = (
            torch.zeros(slots, dtype=torch.int64, device=decoder.device) for _ in range(3)
        )
        self._column = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self._recording: tuple[Sampler, Callable[[], tuple[Tensor, Tensor]]] | None = None

    def record(self, prefix: KeysValues, sampler: Sampler) -> None:
        """Have steps of all slots replayed from now on; where there are no graphs, called.

        The slots must be clear, and are.
        """
        if self._recording is None or self._recording[0] is not sampler:
            self._column.fill_(self._suffix)
            step = partial(self._step_all, prefix, sampler)
            self._recording = sampler, GraphedStep(step) if self.tokens.is_cuda else step
            self.clear()

    def forget_recording(self) -> None:
        """What was recorded read weights that are gone."""
        self._recording = None

    def step(self, active: int, prefix: KeysValues, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """Decode one token for the first `active` rows: the tokens and their log-probabilities."""
        if self._recording is not None:
            self._column.fill_(self._next_column())
            tokens, log_probs = self._recording[1]()
            return tokens[:active], log_probs[:active]
        cache, column, hidden = self._advance(active)
        return self._decode(active, cache, column, hidden, prefix, sampler)

    def _step_all(self, prefix: KeysValues, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """A step of all slots over all columns: the same tensors and shapes every time."""
        self._hidden.index_fill_(-1, self._column, 0)
        hidden = self._hidden.flatten(0, 1)
        return self._decode(self.count, self._cache, self._column, hidden, prefix, sampler)

    def _decode(
        self,
        rows: int,
        cache: KeysValues,
        column: int | Tensor,
        hidden: Tensor,
        prefix: KeysValues,
        sampler: Sampler,
    ) -> tuple[Tensor, Tensor]:
        tokens, ages, decoder = self.tokens[:rows], self.ages[:rows], self._decoder
        # Slots that nobody holds grow older than any row.
        positions = (ages + (self._prompt_length - 1)).clamp_(max=len(self._places) - 1)
        places = self._places[positions]
        stream = decoder.step(decoder.embed(tokens), places, cache, column, hidden, prefix)
        chosen, log_probs = sampler.choose(decoder.logits(stream), self.keys[:rows], ages)
        tokens.copy_(chosen)
        ages.add_(1)
        return chosen, log_probs

    def clear(self) -> None:
        """Forget every row; what the cache holds is out of sight and finite."""
        self._steps = 0
        self._hidden.fill_(-torch.inf)

    def fill(self, slots: Sequence[int], chunk: KeysValues, members: Sequence[int]) -> None:
        """Give slots the suffix of members of a prefilled chunk.

        What the slots held before is out of sight.
        """
        target, source = (
            torch.tensor(part, device=self._hidden.device) for part in (slots, members)
        )
        self._cache.keys[:, target, :, : self._suffix] = chunk.keys[:, source]
        self._cache.values[:, target, :, : self._suffix] = chunk.values[:, source]
        self._hidden[target] = -torch.inf
        self._hidden[target, ..., : self._suffix] = 0

    def move(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`."""
        used = self._window
        for tensor in (self._cache.keys, self._cache.values):
            tensor[:, target, :, :used] = tensor[:, source, :, :used]
        for state in (self._hidden, self.tokens, self.keys, self.ages):
            state[target] = state[source]

    @property
    def _window(self) -> int:
        """Columns that may hold something: all of them once the ring has come round."""
        return self._suffix + min(self._steps, self._ring)

    def _next_column(self) -> int:
        column = self._suffix + self._steps % self._ring
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


class _Generation:
    """One call of `generate`: who waits, who holds which slot, and what was sampled."""

    def __init__(
        self,
        engine: SlotEngine,
        prefill: Callable[[Tensor], tuple[Tensor, KeysValues]],
        activations: Tensor,
        drafts: list[_Draft],
        group_size: int,
        max_new_tokens: int,
        slots: _Slots,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._drafts, self._is_cancelled, self._prefill = drafts, is_cancelled, prefill
        self._engine, self._sampler, self._max = engine, engine._sampler, max_new_tokens
        self._activations, self._group_size = activations, group_size
        self._unseen, self._waiting = deque(drafts), deque()
        """Rollouts not prefilled yet; (draft, chunk, member) of those with their first token."""
        self._active: list[_Draft] = []
        self._slots = slots

    def run(self) -> None:
        """Until every rollout has ended. Raises GenerationCancelled before a forward pass."""
        self._admit(range(self._slots.count))
        while self._active:
            self._stop_if_cancelled()
            self._step()

    def _stop_if_cancelled(self) -> None:
        if self._is_cancelled():
            missing = sum(not self._has_ended(draft) for draft in self._drafts)
            raise GenerationCancelled(f"{missing} of {len(self._drafts)} were not finished")

    def _prefill_chunk(self) -> None:
        """Prefill activations that fill the slots once; draw the first token of their rollouts."""
        self._stop_if_cancelled()
        size = max(1, self._slots.count // self._group_size) * self._group_size
        drafts = [self._unseen.popleft() for _ in range(min(size, len(self._unseen)))]
        first = drafts[0].index // self._group_size
        members = [draft.index // self._group_size - first for draft in drafts]
        logits, chunk = self._prefill(self._activations[first : first + members[-1] + 1])
        keys = torch.tensor([draft.key for draft in drafts], device=logits.device)
        tokens, log_probs = self._sampler.choose(logits[members], keys, torch.zeros_like(keys))
        self._record(drafts, tokens, log_probs)
        self._waiting.extend(
            (draft, chunk, member)
            for draft, member in zip(drafts, members, strict=True)
            if not self._has_ended(draft)
        )

    def _admit(self, free: Sequence[int]) -> list[int]:
        """Give free slots to waiting rollouts; returns the slots that stay free."""
        free = list(free)
        while free and (self._waiting or self._unseen):
            if not self._waiting:
                self._prefill_chunk()
                continue
            chunk, taken = self._waiting[0][1], []
            while self._waiting and len(taken) < len(free) and self._waiting[0][1] is chunk:
                taken.append(self._waiting.popleft())
            slots, free = free[: len(taken)], free[len(taken) :]
            self._slots.fill(slots, chunk, [member for _, _, member in taken])
            self._occupy(slots, [draft for draft, _, _ in taken])
        return free

    def _occupy(self, slots: Sequence[int], drafts: Sequence[_Draft]) -> None:
        """Decode drafts in slots, each one that was free or the next one."""
        for slot, draft in zip(slots, drafts, strict=True):
            if slot == len(self._active):
                self._active.append(draft)
            else:
                self._active[slot] = draft
        states = [(draft.token_ids[-1], draft.key, len(draft.token_ids)) for draft in drafts]
        device = self._slots.tokens.device
        columns = torch.tensor(states, device=device).unbind(1)
        target = torch.tensor(slots, device=device)
        held = (self._slots.tokens, self._slots.keys, self._slots.ages)
        for state, column in zip(held, columns, strict=True):
            state[target] = column

    def _step(self) -> None:
        """Decode one token for every active row and hand on the slots of those that ended."""
        chosen, log_probs = self._slots.step(len(self._active), self._engine.prefix, self._sampler)
        self._record(self._active, chosen, log_probs)
        ended = [slot for slot, draft in enumerate(self._active) if self._has_ended(draft)]
        if ended:
            self._close_gaps(self._admit(ended))

    def _close_gaps(self, free: Sequence[int]) -> None:
        """Move the last active rows into free slots, so that the active rows are the first ones."""
        for slot in sorted(free, reverse=True):
            last = len(self._active) - 1
            if slot != last:
                self._slots.move(last, slot)
                self._active[slot] = self._active[last]
            self._active.pop()

    def _record(self, drafts: Sequence[_Draft], tokens: Tensor, log_probs: Tensor) -> None:
        sampled = log_probs.tolist()
        check_log_probs(sampled, self._engine.weight_version)
        for draft, token, log_prob in zip(drafts, tokens.tolist(), sampled, strict=True):
            draft.token_ids.append(token)
            draft.log_probs.append(log_prob)
            draft.finished = token in self._engine.end_ids

    def _has_ended(self, draft: _Draft) -> bool:
        return draft.finished or len(draft.token_ids) >= self._max
