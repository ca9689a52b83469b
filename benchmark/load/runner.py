"""Sends the requests of a plan when they are due, and records their outcomes.

Open loop: no server delays a request, except later turns of a conversation and, where there is a limit on concurrency,
requests that wait for a slot, which counts as part of the latency. Knows no HTTP: it drives a `RequestSender` by a
`Clock`, so that tests need no real time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from baton.benchmark.load.bodies import PastTurn
from baton.benchmark.load.client import StreamOutcome
from baton.benchmark.load.plan import Conversation, Plan, Turn
from baton.benchmark.load.record import CANCELLED, COMPLETED, FAILED, Record

LOOK_AHEAD_BYTES = 64 << 20
"""Requests are encoded ahead of their time, up to so much memory."""


class RequestSender(Protocol):
    def prepare(self, turn: Turn, before: Sequence[PastTurn]) -> bytes: ...

    def user_text(self, turn: Turn) -> str: ...

    async def send(
        self, request: bytes, cancel_after: int | None, keep_text: bool, clock: Callable[[], float]
    ) -> StreamOutcome: ...


class Clock(Protocol):
    def now_s(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None:
        """Returns at once where that is past, after other tasks had their turn."""
        ...


class RealClock:
    def now_s(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        while (left_s := at_s - time.perf_counter()) > 0:  # event loops round to milliseconds and may wake early
            await asyncio.sleep(left_s)


class Watch(Protocol):
    """Observes every request: a progress bar, or nothing."""

    def sent(self) -> None: ...

    def ended(self, record: Record) -> None: ...

    def close(self) -> None: ...


class NoWatch:
    def sent(self) -> None: ...

    def ended(self, record: Record) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunLog:
    records: tuple[Record, ...]
    duration_s: float
    """From the start to the last end of a request."""
    num_unsent: int
    """Later turns of conversations that failed or were cancelled."""


class LoadRunner:
    """One run of one plan."""

    def __init__(
        self, plan: Plan, sender: RequestSender, clock: Clock, max_concurrency: int | None, watch: Watch
    ) -> None:
        self._plan = plan
        self._sender = sender
        self._clock = clock
        self._limited = max_concurrency is not None
        self._slots = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        self._watch = watch
        self._records: list[Record] = []
        self._start_s = 0.0

    async def warm_up(self) -> list[str]:
        """Send the warm-ups, all at once; returns their errors."""
        async with asyncio.TaskGroup() as tasks:
            sent = [tasks.create_task(self._warm_up(turn)) for turn in self._plan.warmups]
        return [error for task in sent if (error := task.result())]

    async def run(self) -> RunLog:
        ahead = _Ahead(self._sender, self._plan.conversations)
        self._start_s = self._clock.now_s()
        first_index = 0
        async with asyncio.TaskGroup() as tasks:
            for number, conversation in enumerate(self._plan.conversations):
                request = ahead.take()
                await self._clock.sleep_until(self._start_s + conversation.due_s)
                tasks.create_task(self._converse(number, first_index, conversation, request))
                first_index += len(conversation.turns)
        records = tuple(sorted(self._records, key=lambda record: record.index))
        duration_s = max((record.last_s for record in records), default=0.0)
        return RunLog(records, duration_s, self._plan.num_requests - len(records))

    async def _warm_up(self, turn: Turn) -> str:
        async with self._slots:
            return (await self._sender.send(self._sender.prepare(turn, ()), None, False, self._clock.now_s)).error

    async def _converse(self, number: int, first_index: int, conversation: Conversation, request: bytes) -> None:
        due_s = conversation.due_s
        past: list[PastTurn] = []
        for place, turn in enumerate(conversation.turns):
            goes_on = place + 1 < len(conversation.turns)
            outcome, record = await self._request(request, turn, goes_on, due_s, (first_index + place, number, place))
            self._records.append(record)
            self._watch.ended(record)
            if not goes_on or not record.completed:
                return
            past.append(PastTurn(self._sender.user_text(turn), outcome.text))
            due_s = record.last_s + conversation.think_s
            request = self._sender.prepare(conversation.turns[place + 1], past)
            await self._clock.sleep_until(self._start_s + due_s)

    async def _request(
        self, request: bytes, turn: Turn, keep_text: bool, due_s: float, place: tuple[int, int, int]
    ) -> tuple[StreamOutcome, Record]:
        begun_s = self._now_s()
        async with self._slots:
            sent_s = self._now_s()
            if self._limited and not self._plan.scheduled and place[2] == 0:
                due_s = begun_s = sent_s  # a closed loop: it could not have been sent before
            self._watch.sent()
            outcome = await self._sender.send(request, turn.cancel_after, keep_text, self._clock.now_s)
        return outcome, self._record(outcome, turn, (due_s, begun_s, sent_s), place)

    def _record(
        self, outcome: StreamOutcome, turn: Turn, times_s: tuple[float, float, float], place: tuple[int, int, int]
    ) -> Record:
        usage = outcome.usage
        details = usage.prompt_tokens_details if usage else None
        return Record(
            index=place[0],
            conversation=place[1],
            turn=place[2],
            status=FAILED if outcome.error else CANCELLED if outcome.cancelled else COMPLETED,
            error=outcome.error,
            due_s=times_s[0],
            begun_s=times_s[1],
            sent_s=times_s[2],
            first_s=None if outcome.first_s is None else outcome.first_s - self._start_s,
            last_s=outcome.last_s - self._start_s,
            gaps_s=outcome.gaps_s,
            prompt_tokens=usage.prompt_tokens if usage else turn.prompt_tokens or 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            output_tokens=usage.completion_tokens if usage else outcome.num_text_chunks,
            counted=usage is not None,
        )

    def _now_s(self) -> float:
        return self._clock.now_s() - self._start_s


class _Ahead:
    """First requests of conversations, made before they are due."""

    def __init__(self, sender: RequestSender, conversations: Sequence[Conversation]) -> None:
        self._sender = sender
        self._left = deque(conversations)
        self._made: deque[bytes] = deque()
        self._made_bytes = 0
        self._fill()

    def take(self) -> bytes:
        """The next one; called once for each conversation, in order."""
        self._fill()
        request = self._made.popleft()
        self._made_bytes -= len(request)
        return request

    def _fill(self) -> None:
        while self._left and (not self._made or self._made_bytes < LOOK_AHEAD_BYTES):
            request = self._sender.prepare(self._left.popleft().turns[0], ())
            self._made.append(request)
            self._made_bytes += len(request)
