"""Rates, requests under way, failures in a row and the budget, computed by hand."""

from __future__ import annotations

import asyncio

import pytest

from nla_ray.label.limits import Breaker, Budget, BudgetReached, Concurrency, Patience, RequestRate


def test_requests_and_tokens_of_a_minute_are_spread_evenly() -> None:
    rate = RequestRate(requests_per_minute=30, tokens_per_minute=6_000)
    booked = [rate.book(0.0, tokens) for tokens in (100, 400, 100, 100)]
    # A request takes 2 s, a token 10 ms: 2 s, 4 s, 2 s.
    assert booked == [0.0, 2.0, 6.0, 8.0]
    rate.correct(-50 + 250)  # 2 s more than was said
    assert rate.book(0.0, 100) == pytest.approx(12.0)
    assert rate.book(100.0, 100) == 100.0  # what was not used is lost


def test_without_limits_nothing_waits_but_for_a_pause() -> None:
    rate = RequestRate(None, None)
    assert [rate.book(5.0, 10_000) for _ in range(3)] == [5.0, 5.0, 5.0]
    rate.pause(9.0)
    rate.pause(7.0)
    assert rate.paused_until == 9.0


def test_requests_under_way_grow_by_answers_and_are_halved_once_a_refusal() -> None:
    concurrency = Concurrency(most=64)
    first = concurrency.limit
    for _ in range(12):
        concurrency.answered()
    assert concurrency.limit == first + 12
    concurrency.refused(0)
    concurrency.refused(0)  # it was sent before the first refusal was known
    assert concurrency.limit == (first + 12) // 2 == 8
    for _ in range(8):
        concurrency.answered()
    assert concurrency.limit == 8  # 8 + 8 answers of less than an eighth each
    concurrency.answered()
    assert concurrency.limit == 9
    for generation in range(1, 9):
        concurrency.refused(generation)
    assert concurrency.limit == 1
    for _ in range(10_000):
        concurrency.answered()
    assert concurrency.limit == 64


def test_no_more_requests_are_under_way_than_the_limit() -> None:
    async def main() -> int:
        concurrency, under_way, most = Concurrency(most=4), 0, 0

        async def request() -> None:
            nonlocal under_way, most
            await concurrency.enter()
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0)
            under_way -= 1
            await concurrency.leave()

        await asyncio.gather(*(request() for _ in range(50)))
        return most

    assert asyncio.run(main()) == 4


def test_failures_in_a_row_bring_longer_rests_and_then_the_end() -> None:
    patience = Patience(failures_in_row=3, rest_seconds=5.0, rests=2)
    breaker = Breaker(patience)
    assert [breaker.failed() for _ in range(6)] == [0, 0, 5.0, 0, 0, 10.0]
    breaker.answered()
    assert [breaker.failed() for _ in range(9)] == [0, 0, 5.0, 0, 0, 10.0, 0, 0, float("inf")]


def test_no_request_that_could_pass_the_budget_is_let_through() -> None:
    async def main() -> list[str]:
        budget, said = Budget(1.0, spent_usd=0.1), []
        first = await budget.reserve(0.4)
        second = await budget.reserve(0.5)

        async def third() -> None:
            number = await budget.reserve(0.4)  # waits: 0.1 + 0.4 + 0.5 + 0.4 > 1
            said.append("third")
            await budget.settle(number, 0.4)

        waiting = asyncio.create_task(third())
        await asyncio.sleep(0)
        await budget.settle(first, 0.3)  # 0.4 + 0.5 + 0.4 > 1
        await asyncio.sleep(0)
        said.append("second costs little")
        await budget.settle(second, 0.1)  # 0.5 + 0.4 <= 1
        await waiting
        with pytest.raises(BudgetReached):
            await budget.reserve(0.2)  # 0.9 + 0.2 > 1, and nothing is under way
        assert budget.spent_usd == pytest.approx(0.9)
        return said

    assert asyncio.run(main()) == ["second costs little", "third"]
