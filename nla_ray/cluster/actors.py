"""A pool of Ray actors that may die at any time: the rim around plain worker classes.

Ray restarts an actor that died, with the same constructor arguments, and sends the calls it had in
flight again. So a worker must owe nothing to earlier calls, and every call carries what it needs.
The pool belongs to the driver: its actors outlive a trainer that is restarted, and leave with the
driver, however it ends. It knows nothing of models.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nla_ray.cluster.resources import worker_options
from nla_ray.settings.config import ComputeConfig
from nla_ray.settings.resources import Kind

if TYPE_CHECKING:
    import numpy as np
    from ray import ObjectRef


MAX_RESTARTS = 20
"""Deaths of one actor in one stage that are made good; lost nodes of a spot market do not count."""
MAX_RETRIES = 3
"""Times one call is sent again because its actor died under it."""


class ActorPool:
    """`count` actors of a worker class; calls are shared out in turn.

    A pool can be sent to other processes.
    """

    def __init__(
        self,
        kind: Kind,
        worker_class: type,
        arguments: Sequence[Any],
        *,
        count: int,
        compute: ComputeConfig,
    ) -> None:
        """Start the actors, each with the same `arguments`.

        Large arguments travel as SharedArray, never as bare references: Ray would not keep those
        for a restart.
        """
        import ray

        self.kind = kind
        actor_class = ray.remote(worker_class).options(
            max_restarts=MAX_RESTARTS, max_task_retries=MAX_RETRIES, **worker_options(compute, kind)
        )
        self._actors = [actor_class.remote(*arguments) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def part(self, rank: int, ranks: int) -> ActorPool:
        """The actors that serve caller `rank` of `ranks`.

        An even share; where actors are fewer than callers, an actor that several callers share.
        """
        start, end = rank * len(self) // ranks, (rank + 1) * len(self) // ranks
        share = copy.copy(self)
        share._actors = self._actors[start : max(end, start + 1)]
        return share

    def submit(self, method: str, requests: Sequence[tuple]) -> list[ObjectRef]:
        """Start `method(*request)` for every request; requests go to the actors in turn."""
        return [
            getattr(self._actors[index % len(self)], method).remote(*request)
            for index, request in enumerate(requests)
        ]

    def collect(self, calls: Sequence[ObjectRef]) -> list[Any]:
        """Wait for the results, in order.

        Raises RuntimeError when an actor died more often than is made good.
        """
        import ray
        from ray.exceptions import RayActorError

        try:
            return ray.get(list(calls))
        except RayActorError as error:
            raise RuntimeError(
                f"{self.kind} actors: got one that died {MAX_RETRIES + 1} times under one call or"
                f" {MAX_RESTARTS + 1} times in all, expected it to come back"
                f" ({str(error).strip().splitlines()[-1]}). Look for its end in Ray's logs (often"
                " memory), and run the job again: it goes on from the last checkpoint."
            ) from error

    def close(self) -> None:
        """End the actors at once."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


def split_evenly(values: Sequence[Any], parts: int) -> list[list[Any]]:
    """Contiguous parts whose lengths differ by one at most; empty parts are left out.

    >>> split_evenly([1, 2, 3], 2), split_evenly([1], 2)
    ([[1, 2], [3]], [[1]])
    """
    size, longer = divmod(len(values), parts)
    ends = [0]
    for part in range(parts):
        ends.append(ends[-1] + size + (part < longer))
    return [list(values[start:end]) for start, end in itertools.pairwise(ends) if end > start]


class SharedArray:
    """An array in the object store, which all processes of a node read in place.

    It lives as long as the process that made it. The reference is pickled out of Ray's sight: so it
    is never dropped, as an actor that is restarted needs, and Ray does not print an error about it
    at the start of every actor.
    """

    def __init__(self, array: np.ndarray) -> None:
        import ray
        from ray import cloudpickle

        self._pickled_reference = cloudpickle.dumps(ray.put(array))

    def read(self) -> np.ndarray:
        """The array, in the store's own memory."""
        import ray
        from ray import cloudpickle

        return ray.get(cloudpickle.loads(self._pickled_reference))


def shared_tensor(array: SharedArray | np.ndarray) -> Tensor:
    """A tensor on the memory of an array that other processes read: index it, never write to it."""
    if isinstance(array, SharedArray):
        array = array.read()
    with warnings.catch_warnings():
        # The store's memory is read-only, of which torch warns.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
