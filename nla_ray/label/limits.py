"""How many requests one teacher gets, how fast, and what all of them may cost.

Four small owners of one thing each: the rate, the requests under way, failures in a row, and the
money. They know neither HTTP nor files. Protects the rule that no request is sent that could pass
the budget.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

_SECONDS_A_MINUTE = 60.0
_FIRST_REQUESTS = 4
"""Requests under way at the start."""


class BudgetReached(Exception):
    """The next request could pass the budget, and none is under way that could cost less."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long failures are borne. Seconds."""

    tries: int = 6
    """Requests for one text, without those that a limit refused."""
    limit_tries: int = 40
    """Refusals by a limit for one text, without an answer of the teacher between them, after which
    the job stops."""
    first_seconds: float = 0.5
    """The wait after a first failure; it doubles with each, up to `most_seconds`."""
    most_seconds: float = 30.0
    failures_in_row: int = 12
    """Failures of a teacher without an answer between them, after which it rests."""
    rest_seconds: float = 5.0
    """The first rest; it doubles."""
    rests: int = 4
    """Rests without an answer between them, after which the job stops."""

    def wait_seconds(self, failures: int, draw: float) -> float:
        """The wait after so many failures, from half of it to all by `draw` in [0, 1).

        >>> Patience().wait_seconds(3, draw=0.0)
        1.0
        """
        whole = min(self.most_seconds, self.first_seconds * 2 ** (failures - 1))
        return whole * (0.5 + draw / 2)


class RequestRate:
    """When requests may be sent: evenly, at most so many requests and tokens a minute.

    Times are seconds of one clock, which the caller reads.
    """

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._request_seconds = _seconds_each(requests_per_minute)
        self._token_seconds = _seconds_each(tokens_per_minute)
        self._free_at = self._paused_until = float("-inf")

    def book(self, now: float, tokens: float) -> float:
        """Book the next request, of about so many tokens; returns when it may be sent.

        >>> rate = RequestRate(60, None)
        >>> rate.book(100.0, tokens=9), rate.book(100.0, tokens=9)
        (100.0, 101.0)
        """
        start = max(now, self._free_at)
        self._free_at = start + max(self._request_seconds, tokens * self._token_seconds)
        return start

    def correct(self, tokens: float) -> None:
        """Say that a booked request took so many tokens more than was said."""
        self._free_at += tokens * self._token_seconds

    def pause(self, until: float) -> None:
        """Send nothing before this time, booked or not."""
        self._paused_until = max(self._paused_until, until)

    @property
    def paused_until(self) -> float:
        """The time before which nothing is sent."""
        return self._paused_until


def _seconds_each(per_minute: int | None) -> float:
    return _SECONDS_A_MINUTE / per_minute if per_minute else 0.0


class Concurrency:
    """How many requests are under way: more with every answer, half when they are too many.

    As congestion control does it: every answer adds one until the first refusal, and one a round
    after it. Of requests that were sent before the last refusal none lowers it again.
    """

    def __init__(self, most: int) -> None:
        self._most, self._limit = most, float(min(most, _FIRST_REQUESTS))
        self._active, self._generation, self._changed = 0, 0, asyncio.Condition()

    @property
    def limit(self) -> int:
        """Most requests under way now."""
        return int(self._limit)

    async def enter(self) -> int:
        """Wait for a place; returns the generation that `refused` asks for."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < self.limit)
            self._active += 1
            return self._generation

    async def leave(self) -> None:
        """Give the place back."""
        async with self._changed:
            self._active -= 1
            self._changed.notify_all()

    def answered(self) -> None:
        """An answer came."""
        step = 1.0 if self._generation == 0 else 1.0 / self._limit
        self._limit = min(float(self._most), self._limit + step)

    def refused(self, generation: int) -> None:
        """A request of this generation was one too many."""
        if generation == self._generation:
            self._limit, self._generation = max(1.0, self._limit / 2), generation + 1


class Breaker:
    """Failures of a teacher in a row: how long it is to rest, and when it is given up."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._failures, self._rests = patience, 0, 0

    def answered(self) -> None:
        """An answer came: all is forgotten."""
        self._failures = self._rests = 0

    def failed(self) -> float:
        """Seconds to rest: 0 while failures are few; infinity when there were rests enough."""
        self._failures += 1
        if self._failures < self._patience.failures_in_row:
            return 0.0
        self._failures, self._rests = 0, self._rests + 1
        if self._rests > self._patience.rests:
            return float("inf")
        return self._patience.rest_seconds * 2 ** (self._rests - 1)


class Budget:
    """What may be spent, in US dollars, on all requests of all teachers together."""

    def __init__(self, most_usd: float | None, spent_usd: float) -> None:
        self._most = float("inf") if most_usd is None else most_usd
        self.spent_usd = spent_usd
        """What is settled."""
        self._reserved: dict[int, float] = {}
        self._number, self._changed = 0, asyncio.Condition()

    async def reserve(self, usd: float) -> int:
        """Set aside the most that a request may cost, once it fits; returns what `settle` takes.

        It waits while a request that is under way could leave enough. Raises BudgetReached.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(usd) or not self._reserved)
            if not self._fits(usd):
                raise BudgetReached
            self._number += 1
            self._reserved[self._number] = usd
            return self._number

    def _fits(self, usd: float) -> bool:
        return self.spent_usd + sum(self._reserved.values()) + usd <= self._most

    async def settle(self, number: int, usd: float) -> None:
        """Say what a request has cost."""
        async with self._changed:
            del self._reserved[number]
            self.spent_usd += usd
            self._changed.notify_all()
