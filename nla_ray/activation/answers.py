"""The plain base's own answers to prompts, greedily.

An answer is a fixed point: every token of it is the likeliest one after those before it, by one
causal pass of the whole base over this prompt and this answer alone, always of the same length.
Batches with caches write drafts, which such passes correct. A draft costs time where it is wrong,
and changes no answer: nothing of a batch, its padding or the order of sums in it is left. So an
answer is a function of prompt and base on one kind of processor, in bfloat16 as in float32; where
experts share a pass, but for ties in the last bits. In float32 it is what transformers' `generate`
gives for the prompt alone. In bfloat16 the likeliest tokens are often equal, and passes with and
without a cache round them apart: with SmolLM2-135M `generate` went on otherwise after three of
five prompts, and four drafts of ten were wrong somewhere in 32 tokens.

Generating prompt by prompt would be slower: `nano` on one core takes .22 s a prompt in that way,
.10 s in this one, of which checking is .04. Knows token ids; no text and no run directory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor

from nla_ray.activation.positions import plan_batches
from nla_ray.base.encoding import end_ids_of
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.settings.config import BaseConfig, CaptureConfig

_FILLER = 0
"""Stands behind an answer in the pass that decides: attention is causal, so any id would do."""


class Answerer:
    """A whole base that answers prompts."""

    def __init__(self, model, end_ids: Collection[int], batch_tokens: int) -> None:
        """`batch_tokens`: of prompts and answers that are drafted together, padding included."""
        self._model, self._end_ids, self._batch_tokens = model, frozenset(end_ids), batch_tokens

    @classmethod
    def load(cls, base: BaseConfig, capture: CaptureConfig, threads: int) -> Self:
        """The base of a configuration, without adapters."""
        torch.set_num_threads(threads)
        model = load_backbone(base)
        return cls(model, end_ids_of(model, load_tokenizer(base)), capture.batch_tokens)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """For each prompt the ids that follow, at most `most` of them (1 or more), up to an end.

        The id that ends an answer is not in it.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        while unfinished:
            lengths = [len(prompts[row]) + most[row] for row in unfinished]
            for batch in plan_batches(lengths, self._batch_tokens):
                rows = [unfinished[number] for number in batch]
                known = [[*prompts[row], *answers[row]] for row in rows]
                missing = [most[row] - len(answers[row]) for row in rows]
                for row, draft in zip(rows, self._draft(known, missing), strict=True):
                    answer = [*answers[row], *draft]
                    answers[row] = self._corrected(prompts[row], answer, most[row])
            unfinished = [
                row
                for row in unfinished
                if len(answers[row]) < most[row] and answers[row][-1] not in self._end_ids
            ]
        return [answer[:-1] if answer[-1] in self._end_ids else answer for answer in answers]

    def _draft(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """What follows each prompt, an end included: in one batch, padded on the left."""
        device, width = self._model.device, max(map(len, prompts))
        ids = torch.full((len(prompts), width), _FILLER)
        seen = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            seen[row, width - len(prompt) :] = 1
        ids, seen = ids.to(device), seen.to(device)
        places = (seen.cumsum(1) - 1).clamp(min=0)
        ends = torch.tensor(sorted(self._end_ids), device=device)
        ended = torch.zeros(len(prompts), 1, dtype=torch.bool, device=device)
        cache, written = None, []
        while len(written) < max(most) and not ended.all():
            output = self._model(
                input_ids=ids,
                attention_mask=seen,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            written.append(ids)
            ended |= torch.isin(ids, ends)
            seen, places = torch.cat([seen, torch.ones_like(ids)], 1), places[:, -1:] + 1
        return [
            self._up_to_end(row[:longest])
            for row, longest in zip(torch.cat(written, 1).tolist(), most, strict=True)
        ]

    def _up_to_end(self, ids: list[int]) -> list[int]:
        """The ids up to the first that ends an answer, that one included."""
        length = next((n for n, token in enumerate(ids, 1) if token in self._end_ids), len(ids))
        return ids[:length]

    def _corrected(self, prompt: Sequence[int], answer: list[int], most: int) -> list[int]:
        """The answer, or what is right of it and then the token in place of the first wrong one."""
        filler = [_FILLER] * (most - len(answer))
        ids = torch.tensor([[*prompt, *answer, *filler]], device=self._model.device)
        logits: Tensor = self._model(
            input_ids=ids, use_cache=False, logits_to_keep=most + 1
        ).logits[0, :-1]
        likeliest = logits.argmax(-1).tolist()
        for number, token in enumerate(answer):
            if token != likeliest[number]:
                return [*answer[:number], likeliest[number]]
        return answer
