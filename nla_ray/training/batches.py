"""Batches of like length: the order in which a training stage sees its examples.

Protects the rule that an order depends on the seed and the epoch alone, so that a resumed run
continues the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from nla_ray.run.identity import seed_of

_POOL_BATCHES = 16
"""Batches sorted together: enough that a batch's lengths are alike, few enough that batches differ
between epochs."""


class LengthBatches(Sampler[int]):
    """Indices in an order that, cut into batches, gives batches of like length in random order.

    The last, smaller batch stays last. `set_epoch` draws anew.

    >>> list(LengthBatches([9, 2, 8, 1], batch_size=2, seed=0))
    [3, 1, 2, 0]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn; the training loop calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(seed_of(self.seed, "batches", str(self.epoch)))
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        pool = _POOL_BATCHES * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [
                alike[first : first + self.batch_size]
                for first in range(0, len(alike), self.batch_size)
            ]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        draw.shuffle(whole)
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        return iter([index for batch in (*whole, *rest) for index in batch])
