"""Choosing tokens: greedy, or by noise that belongs to (seed, row, sample, step, token) alone.

The noise of a token is a hash, so a description does not depend on slots, batching or the order of
rows: a change in the last bit of a logit changes a choice only at a near tie (an inverse-CDF
sampler would flip at every boundary).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MIX_FIRST, _MIX_SECOND = -2048144789, -1028477387
"""0x85EBCA6B and 0xC2B2AE35 as signed 32-bit numbers. Source: the finaliser of MurmurHash3."""
_UNIFORM_STEP = 2.0**-31


def rollout_keys(seed: int, rows: Sequence[int], samples: Sequence[int]) -> Tensor:
    """One 64-bit key per rollout from (seed, row, sample): [n] int64."""
    key = np.full(len(rows), seed & _MASK, dtype=np.uint64)
    for numbers in (rows, samples):
        key = _splitmix(key) ^ np.asarray(numbers, dtype=np.int64).astype(np.uint64)
    return torch.from_numpy(_splitmix(key).astype(np.int64))


def _splitmix(x: np.ndarray) -> np.ndarray:
    """One output of SplitMix64.

    Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators, 2014.
    """
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Chooses the next token of every row."""

    def __init__(
        self, vocab_size: int, temperature: float, device: torch.device | str = "cpu"
    ) -> None:
        if temperature < 0:
            raise ValueError(
                f"temperature: got {temperature}, expected 0 (greedy) or more. Set it to 0 or"
                " above."
            )
        self.temperature = temperature
        tokens = _splitmix(np.arange(vocab_size, dtype=np.uint64)) >> np.uint64(32)
        self._tokens = torch.from_numpy(tokens.astype(np.uint32).view(np.int32)).to(device)

    def choose(self, logits: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and their log-probabilities, both [rows].

        Logits [rows, vocab]; keys and steps [rows] int64. Log-probabilities are those of the
        distribution sampled from (logits / temperature; greedy: temperature 1), in float32.
        Exponential race: the token with the largest p / E, E standard exponential, is a sample
        from p.
        """
        logits = logits.float()
        if self.temperature == 0:
            chosen = logits.argmax(-1)
            return chosen, logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        if self.temperature != 1:
            logits = logits / self.temperature
        probabilities = logits.softmax(-1)
        chosen = (probabilities / self.negative_noise(keys, steps)).argmin(-1)
        return chosen, probabilities.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).log()

    def negative_noise(self, keys: Tensor, steps: Tensor) -> Tensor:
        """-E for every token, E standard exponential noise by (key, step): [rows, vocab] float32.

        It is never zero. Two multiply-xorshift rounds on int32, in place. The arithmetic shifts
        cost the sign, which leaves the 31 bits used.
        """
        mixed = (keys + steps * (_GOLDEN - (1 << 64))).unsqueeze(-1)
        low, high = mixed.to(torch.int32), (mixed >> 32).to(torch.int32)
        bits = self._tokens ^ low
        bits *= _MIX_FIRST
        bits ^= bits >> 15
        bits ^= high
        bits *= _MIX_SECOND
        bits ^= bits >> 16
        return bits.to(torch.float32).add_(0.5).mul_(-_UNIFORM_STEP).log1p_()


def choose_each(
    samplers: Sequence[Sampler], logits: Tensor, keys: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """`Sampler.choose` with a sampler of its own for each row; equal ones are the same object."""
    if all(sampler is samplers[0] for sampler in samplers):
        return samplers[0].choose(logits, keys, steps)
    numbers: dict[Sampler, list[int]] = {}
    for number, sampler in enumerate(samplers):
        numbers.setdefault(sampler, []).append(number)
    tokens = torch.empty_like(keys)
    log_probs = torch.empty(len(keys), device=logits.device)
    for sampler, chosen in numbers.items():
        rows = torch.tensor(chosen, device=logits.device)
        tokens[rows], log_probs[rows] = sampler.choose(logits[rows], keys[rows], steps[rows])
    return tokens, log_probs
