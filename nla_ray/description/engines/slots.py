"""The generation engine: activations -> sampled descriptions, with their log-probabilities.

Rollouts, evaluation and serving call this plain class, which knows nothing of Ray. What it
exploits: every prompt is the same up to the injected token. The life of a submission:

1. The prefix's keys and values are there already, computed once per weight version and shared by
   all rows.
2. While slots are free, activations that wait are prefilled: injected token + suffix, once per
   activation, of several submissions together whose prompts end alike. The last logits give the
   first token of every rollout of the group.
3. Rollouts take slots, one of each submission in turn; each slot holds a copy of the suffix's keys
   and values, then the rollout's own.
4. A step decodes one token for all slots. Keys of one step go to ONE column of the cache, whatever
   each row's length; a mask says which columns belong to a row. Rotary positions are inside the
   keys, so columns may lie in any order.
5. A finished row gives its slot to a waiting rollout, or, when none waits, to the last active row:
   the active rows are always the first ones, and the batch shrinks. On a GPU it does not: there a
   step of all slots over all columns is recorded once and replayed.

Protects two rules: greedy output equals the model's own `generate`, token for token; results do not
depend on slots, nor on what else is described.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nla_ray.activation.injection import as_embeddings
from nla_ray.base.prompts import InjectionPrompt, LayerEnding
from nla_ray.description.engines.decoder import Decoder, KeysValues, empty_prefix
from nla_ray.description.engines.requests import (
    Submission,
    check_log_probs,
    check_request,
    check_slots,
    never,
    require_idle,
    run_submission,
    scaling_of,
)
from nla_ray.description.engines.slot_cache import SlotCache
from nla_ray.description.record import Description
from nla_ray.description.sampling import Sampler, choose_each, rollout_keys
from nla_ray.settings.config import LoraSettings

_ROOMY = 4
"""How many times longer than needed the ring of slots may stay."""
_SAMPLERS = 8
"""Temperatures whose sampler is kept."""


@dataclass(kw_only=True, eq=False)
class _Draft:
    """A rollout in the making."""

    work: _Work
    index: int
    """In the result: activation * group_size + sample."""
    key: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def has_ended(self) -> bool:
        return self.finished or len(self.token_ids) >= self.work.max_new_tokens

    @property
    def state(self) -> tuple[int, int, int]:
        """Last token, key and number of tokens: where the next step goes on."""
        return self.token_ids[-1], self.key, len(self.token_ids)


@dataclass(kw_only=True, eq=False)
class _Work:
    """A submission: which of its rollouts are not prefilled yet, and which wait for a slot."""

    vectors: Tensor
    """[n, vectors, d_model]"""
    rows: list[int]
    group_size: int
    max_new_tokens: int
    ending: LayerEnding
    sampler: Sampler
    drafts: list[_Draft] = field(default_factory=list)
    unseen: deque[_Draft] = field(default_factory=deque)
    ready: deque[tuple[_Draft, KeysValues, int]] = field(default_factory=deque)
    """With their first token, and where their prompt's keys and values are."""
    missing: int = 0
    descriptions: list[Description] | None = None

    @property
    def count(self) -> int:
        return len(self.drafts)

    @property
    def ring(self) -> int:
        """Steps that its longest row takes."""
        return max(1, self.max_new_tokens - 1)

    @property
    def suffix(self) -> int:
        """Tokens of its prompts from the first injected one on."""
        return self.vectors.shape[1] + len(self.ending.suffix_ids)

    def is_like(self, other: _Work) -> bool:
        """Whether the prompts of both can be prefilled in one batch."""
        return self.ending == other.ending and self.suffix == other.suffix


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
        self._samplers: dict[float, Sampler] = {}
        self._works: deque[_Work] = deque()
        """What is not finished; the first one is the next to give a rollout."""
        self._held: list[_Draft | None] = []
        """By slot; None: the row has ended, and its slot is free."""
        self._cache: SlotCache | None = None
        self.load_weights(None, 0)

    def load_weights(self, adapter_state: Mapping[str, Tensor] | None, version: int) -> None:
        """Use these adapter weights from now on; None: the plain base."""
        require_idle(self._works)
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
                if self._cache is not None:
                    self._cache.forget_recording()
        self.weight_version = version

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
        work = self.submit(
            activations,
            group_size=group_size,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            rows=rows,
            ending=ending,
        )
        return run_submission(self, work, is_cancelled)

    def submit(
        self,
        activations: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ending: LayerEnding | None = None,
    ) -> Submission:
        """Have steps write `group_size` descriptions of each, as `GenerationEngine` says."""
        rows = list(range(len(activations))) if rows is None else list(rows)
        ending = ending or self._ending
        vectors = check_request(
            torch.as_tensor(activations),
            rows,
            group_size,
            max_new_tokens,
            d_model=self.decoder.d_model,
            prompt=ending.of(self.prompt),
            context=self.decoder.shape.max_positions,
        )
        work = _Work(
            vectors=vectors,
            rows=rows,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            ending=ending,
            sampler=self._sampler(temperature),
        )
        samples = list(range(group_size)) * len(rows)
        keys = rollout_keys(seed, [row for row in rows for _ in range(group_size)], samples)
        work.drafts = [
            _Draft(work=work, index=index, key=key) for index, key in enumerate(keys.tolist())
        ]
        work.unseen, work.missing = deque(work.drafts), len(work.drafts)
        if work.drafts:
            self._works.append(work)
        else:
            work.descriptions = []
        return work

    @torch.inference_mode()
    def cancel(self, submission: Submission) -> None:
        """Free its slots, as `GenerationEngine` says."""
        for work in [work for work in self._works if work is submission]:
            self._works.remove(work)
            self._held = [
                None if draft is not None and draft.work is work else draft for draft in self._held
            ]
            self._rest()

    @torch.inference_mode()
    def step(self) -> Sequence[Submission]:
        """One pass of the base, as `GenerationEngine` says."""
        if not self._works:
            return []
        cache = self._roomy_cache()
        unseen = self._next_unseen(cache) if self._free_slots(cache) else []
        if unseen:
            self._prefill(unseen)
        self._seat(cache)
        if not unseen:
            self._decode(cache)
        finished = [work for work in self._works if not work.missing]
        for work in finished:
            self._works.remove(work)
            work.descriptions = self._descriptions(work)
        self._rest()
        return finished

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

    def _sampler(self, temperature: float) -> Sampler:
        """One object a temperature: what was recorded belongs to it."""
        if temperature not in self._samplers:
            if len(self._samplers) == _SAMPLERS:
                del self._samplers[next(iter(self._samplers))]
            vocab_size, device = self.decoder.shape.vocab_size, self.decoder.device
            self._samplers[temperature] = Sampler(vocab_size, temperature, device)
        return self._samplers[temperature]

    # slots ----------------------------------------------------------------------------------------

    def _rest(self) -> None:
        """Where nothing is left to do, leave the slots clear."""
        if not self._works:
            self._held = []
            if self._cache is not None:
                self._cache.clear()

    def _roomy_cache(self) -> SlotCache:
        """Slots with room for all that is submitted, and not with room for much longer rows."""
        cache, ring = self._cache, max(work.ring for work in self._works)
        suffix = max(work.suffix for work in self._works)
        count = min(self.max_slots, sum(work.count for work in self._works))
        if (
            cache is None
            or cache.count < count
            or cache.suffix < suffix
            or not ring <= cache.ring <= _ROOMY * ring
        ):
            # Whoever comes to a busy engine is followed by others.
            count = max(cache.count if cache else 0, self.max_slots if self._held else count)
            self._cache = SlotCache(
                self.decoder, count, suffix, ring, prefix=len(self.prompt.prefix_ids)
            )
            if self._records:
                self._cache.record(self.prefix, self._works[0].sampler)
            if cache is not None and self._held:
                self._cache.take_over(cache, len(self._held))
        elif self._records and not self._held:
            cache.record(self.prefix, self._works[0].sampler)
        assert self._cache is not None
        return self._cache

    def _free_slots(self, cache: SlotCache) -> list[int]:
        ended = [slot for slot, draft in enumerate(self._held) if draft is None]
        return [*ended, *range(len(self._held), cache.count)]

    def _seat(self, cache: SlotCache) -> None:
        """Give free slots to rollouts that have their first token."""
        by_chunk: dict[int, list[tuple[int, _Draft, KeysValues, int]]] = {}
        for slot in self._free_slots(cache):
            found = self._next_ready()
            if found is None:
                break
            draft, chunk, member = found
            by_chunk.setdefault(id(chunk), []).append((slot, draft, chunk, member))
            if slot == len(self._held):
                self._held.append(draft)
            else:
                self._held[slot] = draft
        for seated in by_chunk.values():
            slots, drafts, chunks, members = zip(*seated, strict=True)
            cache.fill(slots, chunks[0], members, [draft.state for draft in drafts])

    def _next_ready(self) -> tuple[_Draft, KeysValues, int] | None:
        """A rollout that waits for a slot; submissions take turns."""
        for _ in range(len(self._works)):
            work = self._works[0]
            self._works.rotate(-1)
            if work.ready:
                return work.ready.popleft()
        return None

    def _next_unseen(self, cache: SlotCache) -> list[_Draft]:
        """Rollouts to be prefilled together, which fill the slots once.

        They are of submissions of which none waits for a slot, with prompts like those of the first
        of those.
        """
        works = [work for work in self._works if work.unseen and not work.ready]
        works = [work for work in works if work.is_like(works[0])]
        drafts, room = [], cache.count
        for number, work in enumerate(works):
            groups = max(1, room // (len(works) - number) // work.group_size)
            taken = min(groups * work.group_size, len(work.unseen))
            drafts += [work.unseen.popleft() for _ in range(taken)]
            room -= taken
            if room <= 0:
                break
        return drafts

    def _close_gaps(self, cache: SlotCache) -> None:
        """Move the last active rows into free slots, so that the active rows are the first ones."""
        for slot in reversed(range(len(self._held))):
            if self._held[slot] is None:
                last = self._held.pop()
                if slot != len(self._held):
                    cache.move(len(self._held), slot)
                    self._held[slot] = last

    # passes ---------------------------------------------------------------------------------------

    def _prefill(self, drafts: Sequence[_Draft]) -> None:
        """Prefill the activations of rollouts; draw the first token of each."""
        places = [(draft.work, draft.index // draft.work.group_size) for draft in drafts]
        members = {place: member for member, place in enumerate(dict.fromkeys(places))}
        vectors = torch.stack([work.vectors[row] for work, row in members])
        logits, chunk = self.prefill(vectors, drafts[0].work.ending)
        rows = [members[place] for place in places]
        keys = torch.tensor([draft.key for draft in drafts], device=logits.device)
        samplers = [draft.work.sampler for draft in drafts]
        tokens, log_probs = choose_each(samplers, logits[rows], keys, torch.zeros_like(keys))
        self._record(drafts, tokens, log_probs)
        for draft, member in zip(drafts, rows, strict=True):
            if not draft.has_ended:
                draft.work.ready.append((draft, chunk, member))

    def _decode(self, cache: SlotCache) -> None:
        """One token for every active row; slots of those that ended are free."""
        self._close_gaps(cache)
        drafts = [draft for draft in self._held if draft is not None]
        if drafts:
            chosen, log_probs = cache.step(self.prefix, [draft.work.sampler for draft in drafts])
            self._record(drafts, chosen, log_probs)
            self._held = [None if draft.has_ended else draft for draft in drafts]

    def _record(self, drafts: Sequence[_Draft], tokens: Tensor, log_probs: Tensor) -> None:
        sampled = log_probs.tolist()
        check_log_probs(sampled, self.weight_version)
        for draft, token, log_prob in zip(drafts, tokens.tolist(), sampled, strict=True):
            draft.token_ids.append(token)
            draft.log_probs.append(log_prob)
            draft.finished = token in self.end_ids
            draft.work.missing -= draft.has_ended

    def _descriptions(self, work: _Work) -> list[Description]:
        texts = self.tokenizer.batch_decode(
            [draft.token_ids for draft in work.drafts],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [
            Description.from_sample(
                row=work.rows[draft.index // work.group_size],
                token_ids=draft.token_ids,
                log_probs=draft.log_probs,
                written=written,
                finished=draft.finished,
                weight_version=self.weight_version,
            )
            for draft, written in zip(work.drafts, texts, strict=True)
        ]
