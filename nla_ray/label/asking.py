"""Asks teachers over the network about every text, each once, within limits and the budget.

    texts --not in the store?--> place, rate, budget --> sent written --> SDK --> outcome written

A request that fails is repeated after a wait; a text that no try answers is listed with its reason.
What ends the job (a wrong set-up, the budget, a teacher that is gone) lets the requests under way
finish first: they are paid for. It knows texts and the store; runs are elsewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nla_ray.label.instructions import TeacherPrompt
from nla_ray.label.limits import Breaker, Budget, BudgetReached, Concurrency, Patience, RequestRate
from nla_ray.label.providers import NoReply, Reply, TeacherClient
from nla_ray.label.store import (
    AnswerStore,
    FailedRequest,
    SentRequest,
    StoredAnswer,
    StoreRecord,
    answer_key,
)
from nla_ray.plan.requests import ANSWER_TOKENS, MOST_TEMPLATE_TOKENS
from nla_ray.run.identity import text_hash
from nla_ray.run.log import get_logger
from nla_ray.settings.config import LabelConfig
from nla_ray.settings.teachers import TeacherName, TokenPrice, price_of

logger = get_logger(__name__)

_REMOTE_SECONDS = 0.5
"""Between two writes to an object store: each is a file."""
_TEXTS_AT_ONCE = 64
"""Answered texts that are passed over before requests under way get their turn."""


@dataclass(frozen=True, kw_only=True)
class AskedTeacher:
    """A teacher over the network with all that shapes and prices its answers."""

    teacher: TeacherName
    prompt: TeacherPrompt
    answer_tokens: int
    price: TokenPrice

    @classmethod
    def all_of(cls, config: LabelConfig) -> list[AskedTeacher]:
        """The teachers of a configuration that are asked."""
        if not config.asked:
            return []
        prompt = TeacherPrompt.load(config.prompt)
        return [cls.of(teacher, prompt, config) for teacher in config.asked]

    @classmethod
    def of(cls, teacher: TeacherName, prompt: TeacherPrompt, config: LabelConfig) -> AskedTeacher:
        """One of them, or the cleaner; an unknown price is 0."""
        return cls(
            teacher=teacher,
            prompt=prompt,
            answer_tokens=config.answer_tokens,
            price=price_of(teacher.name, config.prices) or TokenPrice(0.0, 0.0),
        )

    @property
    def parameters(self) -> dict[str, int]:
        """What a request says beside its message."""
        return {"answer_tokens": self.answer_tokens}

    def key(self, text: str) -> str:
        """The key of this teacher's answer about a text."""
        return answer_key(text, self.teacher.name, self.prompt.sha256, self.parameters)

    def most_usd(self, message: str) -> float:
        """The most that a request can cost: a token has a byte at least."""
        return self.price.usd(len(message.encode()) + MOST_TEMPLATE_TOKENS, self.answer_tokens)

    def usd(self, reply: Reply, message: str) -> float:
        """What a request has cost; the most that it can where the provider does not say."""
        if reply.input_tokens is None or reply.output_tokens is None:
            return self.most_usd(message)
        return self.price.usd(reply.input_tokens, reply.output_tokens)

    def answer(self, text: str, reply: Reply, usd: float) -> StoredAnswer:
        """The record of a reply."""
        return StoredAnswer(
            key=self.key(text),
            teacher=self.teacher.name,
            prompt_sha256=self.prompt.sha256,
            parameters=self.parameters,
            text_sha256=text_hash(text),
            text_chars=len(text),
            text=reply.text,
            fault=reply.fault,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
            usd=usd,
        )


@dataclass
class AskedCounts:
    """What one teacher was asked in this start of the job."""

    requests: int = 0
    answers: int = 0
    """Of them with a fault: `faults`."""
    faults: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of asking."""

    counts: dict[str, AskedCounts] = field(default_factory=dict)
    """By teacher."""
    failures: dict[str, str] = field(default_factory=dict)
    """Key -> why it has no answer; another start of the job asks again."""


def ask_teachers(
    teachers: Sequence[AskedTeacher],
    texts: Callable[[], Iterable[str]],
    store: AnswerStore,
    config: LabelConfig,
    *,
    patience: Patience | None = None,
) -> Asked:
    """Ask every teacher about every text that the store has no answer on.

    `texts`: makes a new iterator for each teacher, and may repeat texts. Raises ValueError, with
    everything kept, for a wrong set-up, where the budget is reached, and where a teacher is gone.
    """
    asked = Asked()
    asyncio.run(_ask_all(teachers, config, texts, store, asked, patience or Patience()))
    return asked


async def _ask_all(
    teachers: Sequence[AskedTeacher],
    config: LabelConfig,
    texts: Callable[[], Iterable[str]],
    store: AnswerStore,
    asked: Asked,
    patience: Patience,
) -> None:
    office = _Office(config, store, patience)
    office.desks = [_Desk(teacher, office, asked) for teacher in teachers]
    try:
        async with asyncio.TaskGroup() as group:
            for desk in office.desks:
                own = iter(texts())  # the workers of a desk take turns
                for _ in range(config.max_concurrency):
                    group.create_task(desk.work(own))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for desk in office.desks:
            await desk.close()
    if office.error is not None:
        raise office.error


class _Office:
    """What all teachers share: store, budget, and the end of the job."""

    def __init__(self, config: LabelConfig, store: AnswerStore, patience: Patience) -> None:
        self.config, self.store, self.patience = config, store, patience
        self.budget = Budget(config.max_usd, store.spent_usd)
        self.desks: list[_Desk] = []
        self.error: ValueError | None = None
        self.stopped = asyncio.Event()
        self._checked = asyncio.Lock()
        self._is_ready = False
        self._waiting: list[tuple[StoreRecord, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def stop(self, error: ValueError) -> None:
        """End the job with this error, once what is under way is finished."""
        if self.error is None:
            self.error = error
        self.stopped.set()

    async def sleep(self, seconds: float) -> None:
        """Wait, but for the end of the job."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self.stopped.wait(), seconds)
            except TimeoutError:
                return

    async def is_ready(self) -> bool:
        """Whether all teachers can be asked; they are looked up before the first request."""
        async with self._checked:
            if not self._is_ready and not self.stopped.is_set():
                try:
                    for desk in self.desks:
                        await desk.open()
                    self._is_ready = True
                except ValueError as error:
                    self.stop(error)
            return self._is_ready and not self.stopped.is_set()

    async def commit(self, record: StoreRecord) -> None:
        """Return when the record is written and synced, with whatever waits at the same time."""
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((record, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        while self._waiting:
            if not self.store.location.is_local:
                await asyncio.sleep(_REMOTE_SECONDS)
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self.store.write, [record for record, _ in batch])
            except Exception as error:  # every waiting worker raises it again
                for _, written in batch:
                    if not written.done():
                        written.set_exception(error)
                continue
            for _, written in batch:
                if not written.done():
                    written.set_result(None)


class _Desk:
    """Asks one teacher."""

    def __init__(self, asked_teacher: AskedTeacher, office: _Office, asked: Asked) -> None:
        config = office.config
        self._asked, self._office, self._failures = asked_teacher, office, asked.failures
        self._name = asked_teacher.teacher.name
        self._counts = asked.counts.setdefault(self._name, AskedCounts())
        self._rate = RequestRate(config.requests_per_minute, config.tokens_per_minute)
        self._concurrency = Concurrency(config.max_concurrency)
        self._breaker = Breaker(office.patience)
        self._client: TeacherClient | None = None
        self._under_way: set[str] = set()

    async def open(self) -> None:
        """Make the client and look the model up. Raises ValueError for a wrong set-up."""
        self._client = TeacherClient(
            self._asked.teacher,
            answer_tokens=self._asked.answer_tokens,
            timeout_seconds=self._office.config.timeout_seconds,
        )
        await self._client.check()

    async def close(self) -> None:
        """Close the client's connections."""
        if self._client is not None:
            await self._client.close()

    async def work(self, texts: Iterator[str]) -> None:
        """Ask about the texts that nobody answered; many workers share one iterator."""
        passed = 0
        for text in texts:
            if self._office.stopped.is_set():
                return
            key = self._asked.key(text)
            if key in self._office.store or key in self._under_way or key in self._failures:
                passed += 1
                if passed % _TEXTS_AT_ONCE == 0:
                    await asyncio.sleep(0)
                continue
            self._under_way.add(key)
            if not await self._office.is_ready():
                return
            await self._ask(key, text)
            self._under_way.remove(key)

    async def _ask(self, key: str, text: str) -> None:
        """Ask about one text until there is an answer, or no hope of one."""
        patience, draw = self._office.patience, random.Random(key)
        failures = limits = 0
        answers_before = self._counts.answers
        while not self._office.stopped.is_set():
            failure = await self._try(key, text)
            if failure is None:
                return
            if failure.is_limit:
                limits += 1
                if limits >= patience.limit_tries:
                    if self._counts.answers == answers_before:
                        self._give_up(failure, limits)
                    limits, answers_before = 0, self._counts.answers
                wait = patience.wait_seconds(max(1, min(limits, 20)), draw.random())
                self._pause(wait if failure.retry_after is None else failure.retry_after)
                continue
            failures += 1
            self._rest_after(failure)
            if not failure.repeat or failures >= patience.tries:
                self._failures[key] = failure.reason
                return
            wait = patience.wait_seconds(failures, draw.random())
            await self._office.sleep(max(wait, failure.retry_after or 0.0))

    async def _try(self, key: str, text: str) -> NoReply | None:
        """One request; None when it is answered for good, or the job ends."""
        message = self._asked.prompt.message(text)
        tokens = len(message) / 4 + ANSWER_TOKENS
        most_usd = usd = self._asked.most_usd(message)
        generation = await self._concurrency.enter()
        try:
            await self._wait_for_turn(tokens)
            reserved = await self._reserve(most_usd)
            if reserved is None:
                return None
            try:
                await self._office.commit(SentRequest(key=key, usd=most_usd))
                outcome = await self._send(message)
                record = self._record(key, text, message, outcome, most_usd)
                usd = record.usd
                await self._office.commit(record)
            finally:
                await self._office.budget.settle(reserved, usd)
                self._counts.usd += usd
        finally:
            await self._concurrency.leave()
        if isinstance(outcome, NoReply):
            if outcome.is_limit:
                self._concurrency.refused(generation)
            return None if outcome.final else outcome
        if isinstance(outcome, ValueError):
            self._office.stop(outcome)
            return None
        self._count(outcome, tokens)
        return None

    async def _wait_for_turn(self, tokens: float) -> None:
        """Wait until the rate lets a request of about so many tokens through."""
        clock = asyncio.get_running_loop().time
        start = self._rate.book(clock(), tokens)
        while (wait := max(start, self._rate.paused_until) - clock()) > 0:
            await self._office.sleep(wait)
            if self._office.stopped.is_set():
                return

    async def _reserve(self, most_usd: float) -> int | None:
        """A place in the budget; None when the job ends, by the budget or something else."""
        if self._office.stopped.is_set():
            return None
        try:
            reserved = await self._office.budget.reserve(most_usd)
        except BudgetReached:
            self._office.stop(
                ValueError(
                    f"label.max_usd {self._office.config.max_usd}: got"
                    f" {self._office.budget.spent_usd:.6g} US dollars spent and a request to"
                    f" {self._name} that could cost {most_usd:.2g}, expected that it fits."
                    f" {len(self._office.store):,} answers are kept: raise --label.max-usd and run"
                    " the same command again."
                )
            )
            return None
        if self._office.stopped.is_set():
            await self._office.budget.settle(reserved, 0.0)
            return None
        return reserved

    async def _send(self, message: str) -> Reply | NoReply | ValueError:
        """What comes of one request, errors too."""
        assert self._client is not None
        self._counts.requests += 1
        try:
            return await self._client.ask(message)
        except (NoReply, ValueError) as error:
            return error

    def _record(
        self,
        key: str,
        text: str,
        message: str,
        outcome: Reply | NoReply | ValueError,
        most_usd: float,
    ) -> FailedRequest | StoredAnswer:
        if isinstance(outcome, Reply):
            return self._asked.answer(text, outcome, self._asked.usd(outcome, message))
        if isinstance(outcome, NoReply) and outcome.final:
            nothing = Reply(text="", fault=outcome.reason, input_tokens=0, output_tokens=0)
            return self._asked.answer(text, nothing, 0.0)
        is_billed = isinstance(outcome, NoReply) and outcome.billed
        return FailedRequest(key=key, reason=str(outcome), usd=most_usd if is_billed else 0.0)

    def _count(self, reply: Reply, tokens: float) -> None:
        self._breaker.answered()
        self._concurrency.answered()
        self._counts.answers += 1
        self._counts.faults += bool(reply.fault)
        self._counts.input_tokens += reply.input_tokens or 0
        self._counts.output_tokens += reply.output_tokens or 0
        if reply.input_tokens is not None and reply.output_tokens is not None:
            self._rate.correct(reply.input_tokens + reply.output_tokens - tokens)

    def _pause(self, seconds: float) -> None:
        """Ask this teacher nothing for so long."""
        if seconds >= 60:
            logger.info("labels: %s asks to wait %.0f s", self._name, seconds)
        self._rate.pause(asyncio.get_running_loop().time() + seconds)

    def _rest_after(self, failure: NoReply) -> None:
        """Let the teacher rest after failures in a row; give it up after rests enough."""
        seconds = self._breaker.failed()
        if seconds == 0.0:
            return
        never_answered = not failure.repeat and self._counts.answers == 0
        if seconds == float("inf") or never_answered:
            self._give_up(failure, self._office.patience.failures_in_row)
        else:
            logger.warning("labels: %s fails (%s): resting", self._name, failure.reason)
            self._pause(seconds)

    def _give_up(self, failure: NoReply, times: int) -> None:
        self._office.stop(
            ValueError(
                f"teacher {self._name}: got {times} failures in a row, the last one"
                f" {failure.reason}, expected answers. What was answered is kept: run the same"
                " command again when the teacher answers."
            )
        )
