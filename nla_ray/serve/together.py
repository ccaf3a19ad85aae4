"""Work of several requests, done together: descriptions step by step, all else batch by batch.

Each kind has one thread that runs the models, so that the event loop stays free for whoever asks,
leaves, or wants to know whether all is well. A request that is cancelled is left out from the next
step or batch on. A thread ends when nothing has come for a while, and starts with the next request.
Knows neither HTTP nor Ray nor what is computed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from nla_ray.description.engines.interface import GenerationEngine
from nla_ray.description.engines.requests import Submission
from nla_ray.description.record import Description

_IDLE_SECONDS = 10.0
_Job = TypeVar("_Job")


class _WaitingWork(Generic[_Job]):
    """Jobs that no thread has taken yet; the thread that takes them lives as long as jobs come."""

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._run, self._name = run, name
        self._changed, self._has_thread = threading.Condition(), False
        self._new: list[_Job] = []

    def add(self, jobs: Iterable[_Job]) -> None:
        """Give jobs to the thread, and start one where none is."""
        with self._changed:
            self._new.extend(jobs)
            if not self._has_thread:
                self._has_thread = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._changed.notify()

    def take(self, *, is_busy: bool) -> list[_Job] | None:
        """In the thread: what has come since the last call; None: end the thread.

        A thread that is busy does not wait for it.
        """
        with self._changed:
            if not self._new and not is_busy:
                self._changed.wait(_IDLE_SECONDS)
            if not self._new and not is_busy:
                self._has_thread = False
                return None
            taken, self._new = self._new, []
            return taken


def _answer(future: Future, answer: Any) -> None:
    """Deliver an answer, or an error, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


# descriptions -------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class _Describing:
    """Descriptions that one request waits for."""

    engine: GenerationEngine
    activations: Tensor
    sampling: dict[str, Any]
    submission: Submission | None = None
    future: Future[list[Description]] = field(default_factory=Future)


class DescribingThread:
    """Steps engines for all requests that wait; each engine writes theirs side by side."""

    def __init__(self) -> None:
        self._work = _WaitingWork[_Describing](self._run, "describing")

    async def describe(
        self, engine: GenerationEngine, activations: Tensor, **sampling: Any
    ) -> list[Description]:
        """What `engine.generate` returns; cancelled, it is written no further.

        `sampling`: arguments of `GenerationEngine.submit`. Raises what the engine raises.
        """
        job = _Describing(engine=engine, activations=activations, sampling=sampling)
        self._work.add([job])
        return await asyncio.wrap_future(job.future)

    def _run(self) -> None:
        jobs: list[_Describing] = []
        while (new := self._work.take(is_busy=bool(jobs))) is not None:
            jobs += [job for job in new if _submit(job)]
            left = [job for job in jobs if job.future.cancelled()]
            jobs = [job for job in jobs if job not in left]
            _cancel(left)
            for engine in dict.fromkeys(job.engine for job in jobs):
                _step(engine, [job for job in jobs if job.engine is engine])
            jobs = [job for job in jobs if not job.future.done() or job.future.cancelled()]


def _submit(job: _Describing) -> bool:
    """Whether the engine took it."""
    try:
        job.submission = job.engine.submit(job.activations, **job.sampling)
    except Exception as error:
        _answer(job.future, error)
    return job.submission is not None


def _cancel(jobs: Sequence[_Describing]) -> None:
    for job in jobs:
        if job.submission is not None:
            job.engine.cancel(job.submission)


def _step(engine: GenerationEngine, jobs: Sequence[_Describing]) -> None:
    """One step for the jobs of an engine; an error of it is the answer to all of them."""
    try:
        engine.step()
    except Exception as error:
        _cancel(jobs)
        for job in jobs:
            _answer(job.future, error)
        return
    for job in jobs:
        if job.submission is not None and job.submission.descriptions is not None:
            _answer(job.future, job.submission.descriptions)


# batches ------------------------------------------------------------------------------------------

_Compute = Callable[[list[Any]], Sequence[Any]]
"""Items of one kind in, an answer for each out."""


@dataclass(kw_only=True, eq=False)
class _Batched:
    """Items that one request waits for."""

    compute: _Compute
    items: Sequence[Any]
    sizes: Sequence[int]
    answers: dict[int, Any] = field(default_factory=dict)
    begun: int = 0
    """Items that are computed, or are in the batch that is being computed."""
    future: Future[list[Any]] = field(default_factory=Future)


class BatchingThread:
    """Computes items of all requests that wait in batches of a bounded size, one at a time."""

    def __init__(self, *, largest: int, window_seconds: float = 0.0) -> None:
        """`largest`: size of a batch; an item that is larger is one by itself.

        `window_seconds`: of waiting for further requests, where no batch is being computed.
        """
        self._largest, self._window = largest, window_seconds
        self._work = _WaitingWork[_Batched](self._run, "batching")

    async def answer(
        self, compute: _Compute, items: Sequence[Any], sizes: Sequence[int]
    ) -> list[Any]:
        """The answer to every item; cancelled, further items are not computed.

        Items are computed with those of other calls of an equal `compute`. `sizes`: of each item,
        in tokens or what else `largest` counts. Raises what `compute` raises.
        """
        if not items:
            return []
        call = _Batched(compute=compute, items=items, sizes=sizes)
        self._work.add([call])
        return await asyncio.wrap_future(call.future)

    def _run(self) -> None:
        calls: list[_Batched] = []
        while (new := self._work.take(is_busy=bool(calls))) is not None:
            if not calls and self._window:
                time.sleep(self._window)
                new += self._work.take(is_busy=True) or []
            calls = [call for call in (*calls, *new) if not call.future.cancelled()]
            if calls:
                calls = self._compute_batch(calls)

    def _compute_batch(self, calls: Sequence[_Batched]) -> list[_Batched]:
        """Compute a batch of the first call's kind; what is left to do, other kinds first."""
        compute = calls[0].compute
        same = [call for call in calls if call.compute == compute]
        others = [call for call in calls if call.compute != compute]
        batch = self._next_batch(same)
        try:
            answers = compute([call.items[number] for call, number in batch])
        except Exception as error:
            for call in dict.fromkeys(call for call, _ in batch):
                _answer(call.future, error)
            return others + [call for call in same if not call.future.done()]
        for (call, number), answer in zip(batch, answers, strict=True):
            call.answers[number] = answer
        for call in same:
            if len(call.answers) == len(call.items):
                _answer(call.future, [call.answers[number] for number in range(len(call.items))])
        return others + [call for call in same if not call.future.done()]

    def _next_batch(self, calls: Sequence[_Batched]) -> list[tuple[_Batched, int]]:
        """Items of calls, which take turns: a call of many keeps none of few waiting."""
        turns, batch, size = deque(calls), list[tuple[_Batched, int]](), 0
        while turns:
            call = turns.popleft()
            size += call.sizes[call.begun]
            if batch and size > self._largest:
                break
            batch.append((call, call.begun))
            call.begun += 1
            if call.begun < len(call.items):
                turns.append(call)
        return batch
