"""Batches of like length: the order in which a training stage sees its examples.

Protects the rule that an order depends on the seed and the epoch alone, so that a resumed run
continues the same batches, and any number of workers shares out the same ones.
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

    The last batch is filled up with blanks: indices from `len(lengths)` on, of rows that the caller
    gives no loss. So every batch can be shared out evenly; where the last one is not, a library
    repeats rows in it, another number for every number of workers. `set_epoch` draws anew.

    >>> list(LengthBatches([9, 2, 8, 1, 5], batch_size=2, seed=0))
    [4, 2, 3, 1, 0, 5]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.num_blanks = -len(self.lengths) % batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn; the training loop calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.num_blanks

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
        blanks = range(len(self.lengths), len(self))
        return iter([*(index for batch in (*whole, *rest) for index in batch), *blanks])
