"""The runner with a scripted sender and clock: an open loop stays open, and every wait has a waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from uvicorn.loops.auto import auto_loop_factory

from baton.benchmark.load.bodies import PastTurn
from baton.benchmark.load.client import StreamOutcome
from baton.benchmark.load.meter import Usage
from baton.benchmark.load.plan import Conversation, GivenPrompt, Plan, Turn
from baton.benchmark.load.record import CANCELLED, FAILED, Record
from baton.benchmark.load.runner import LoadRunner, NoWatch, RealClock

TURN = Turn(GivenPrompt("q"), 5)
OUTCOME = StreamOutcome("", False, 0.0, 0.0, (0.25,), 2, Usage(7, 2, None), "answer")


async def others() -> None:
    """Give every task that can go on its turns."""
    for _ in range(20):
        await asyncio.sleep(0)


class JumpingClock:
    """Time that jumps to the next waiter once all tasks are blocked."""

    def __init__(self) -> None:
        self.now = 50.0

    def now_s(self) -> float:
        return self.now

    async def sleep_until(self, at_s: float) -> None:
        await others()
        self.now = max(self.now, at_s)


class FakeSender:
    """Answers after `release`, a token 1 s after the sending and the last 0.25 s later; notes what it is asked."""

    def __init__(self, clock: JumpingClock, outcome: StreamOutcome = OUTCOME) -> None:
        self.release = asyncio.Event()
        self.sent: list[tuple[bytes, float]] = []
        self.now = self.most = 0
        self._clock = clock
        self._outcome = outcome

    def prepare(self, turn: Turn, before: Sequence[PastTurn]) -> bytes:
        assert isinstance(turn.prompt, GivenPrompt)
        return "|".join([*(f"{said.user}>{said.answer}" for said in before), str(turn.prompt.content)]).encode()

    def user_text(self, turn: Turn) -> str:
        assert isinstance(turn.prompt, GivenPrompt)
        return str(turn.prompt.content)

    async def send(
        self, request: bytes, cancel_after: int | None, keep_text: bool, clock: Callable[[], float]
    ) -> StreamOutcome:
        self.sent.append((request, clock()))
        self.now += 1
        self.most = max(self.most, self.now)
        sent_s = clock()
        await self.release.wait()
        self.now -= 1
        text = self._outcome.text if keep_text else ""
        return replace(self._outcome, first_s=sent_s + 1, last_s=sent_s + 1.25, text=text)


def plan(*due_s: float, turns: tuple[Turn, ...] = (TURN,), scheduled: bool = True, think_s: float = 0.0) -> Plan:
    return Plan(tuple(Conversation(at_s, turns, think_s) for at_s in due_s), (TURN, TURN), scheduled)


async def run(runner: LoadRunner) -> tuple[tuple[Record, ...], float, int]:
    async with asyncio.timeout(60):
        log = await runner.run()
    return log.records, log.duration_s, log.num_unsent


async def test_no_request_waits_for_another() -> None:
    """A server that answers nothing is sent every request when it is due: the load is the schedule's, not its own."""
    clock = JumpingClock()
    sender = FakeSender(clock)
    task = asyncio.create_task(run(LoadRunner(plan(0.0, 0.5, 2.0, 9.0), sender, clock, None, NoWatch())))
    async with asyncio.timeout(60):
        while len(sender.sent) < 4:
            await asyncio.sleep(0)
    assert [at_s for _, at_s in sender.sent] == [50.0, 50.5, 52.0, 59.0] and sender.most == 4
    sender.release.set()
    records, duration_s, _ = await task
    assert [record.ttft_s for record in records] == [1.0] * 4 and [record.lag_s for record in records] == [0.0] * 4
    assert duration_s == 9.0 + 1.25 and [record.index for record in records] == [0, 1, 2, 3]
    assert (records[0].prompt_tokens, records[0].output_tokens, records[0].counted) == (7, 2, True)


async def test_waiting_for_a_place_is_part_of_the_latency() -> None:
    """Left out, as clients with a semaphore do, an overloaded server looks as fast as an idle one."""
    clock = JumpingClock()
    sender = FakeSender(clock)
    task = asyncio.create_task(run(LoadRunner(plan(0.0, 1.0, 2.0), sender, clock, 1, NoWatch())))
    async with asyncio.timeout(60):
        while clock.now < 52.0 or not sender.sent:
            await asyncio.sleep(0)
    await others()
    assert sender.most == 1
    clock.now = 60.0
    sender.release.set()
    records, _, _ = await task
    assert sender.most == 1 and [record.sent_s for record in records] == [0.0, 10.0, 10.0]
    assert [record.queue_s for record in records] == [0.0, 9.0, 8.0] and [r.lag_s for r in records] == [0.0, 0.0, 0.0]
    assert [record.ttft_s for record in records] == [1.0, 10.0, 9.0]
    assert [record.e2el_s for record in records] == [1.25, 10.25, 9.25]


async def test_a_closed_loop_begins_to_count_when_it_can_send() -> None:
    """Where all are due at once and places are few, there is no schedule that a wait could be counted from."""
    clock = JumpingClock()
    sender = FakeSender(clock)
    task = asyncio.create_task(run(LoadRunner(plan(0.0, 0.0, scheduled=False), sender, clock, 1, NoWatch())))
    async with asyncio.timeout(60):
        while not sender.sent:
            await asyncio.sleep(0)
    clock.now = 60.0
    sender.release.set()
    records, _, _ = await task
    assert [(record.due_s, record.queue_s, record.lag_s) for record in records] == [(0.0, 0, 0), (10.0, 0, 0)]
    assert [record.ttft_s for record in records] == [1.0, 1.0]


async def test_all_at_once_without_a_limit_counts_from_the_start() -> None:
    """What the client needs to send them all is no fault of the schedule, and shows as lag."""
    clock = JumpingClock()
    sender = FakeSender(clock)
    sender.release.set()
    records, _, _ = await run(LoadRunner(plan(0.0, 0.0, scheduled=False), sender, clock, None, NoWatch()))
    assert [record.due_s for record in records] == [0.0, 0.0]


async def test_a_conversation_goes_on_after_its_answer() -> None:
    """The next turn holds the answer, is due when the user has thought, and its latency begins there."""
    clock = JumpingClock()
    sender = FakeSender(clock)
    sender.release.set()
    turns = tuple(Turn(GivenPrompt(text), 5) for text in ("a", "b", "c"))
    records, _, unsent = await run(LoadRunner(plan(1.0, turns=turns, think_s=10.0), sender, clock, None, NoWatch()))
    assert [request for request, _ in sender.sent] == [b"a", b"a>answer|b", b"a>answer|b>answer|c"]
    assert [record.due_s for record in records] == [1.0, 12.25, 23.5] and unsent == 0
    assert [(record.index, record.conversation, record.turn) for record in records] == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]
    assert [record.ttft_s for record in records] == [1.0] * 3


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(replace(OUTCOME, error="HTTP 500: x"), FAILED), (replace(OUTCOME, cancelled=True), CANCELLED)],
)
async def test_a_conversation_that_broke_off_is_not_continued_and_that_is_told(
    outcome: StreamOutcome, status: str
) -> None:
    """Turns that were never sent must not vanish: a server could improve its figures by failing first turns."""
    clock = JumpingClock()
    sender = FakeSender(clock, outcome)
    sender.release.set()
    records, _, unsent = await run(LoadRunner(plan(0.0, 1.0, turns=(TURN, TURN, TURN)), sender, clock, None, NoWatch()))
    assert [record.status for record in records] == [status, status] and unsent == 4
    assert [record.index for record in records] == [0, 3]


async def test_warm_ups_are_counted_nowhere() -> None:
    """Their times are those of a cold server; their failures are worth a word."""
    clock = JumpingClock()
    sender = FakeSender(clock, replace(OUTCOME, error="no"))
    sender.release.set()
    runner = LoadRunner(plan(0.0), sender, clock, None, NoWatch())
    assert await runner.warm_up() == ["no", "no"]
    records, _, _ = await run(runner)
    assert len(records) == 1 and len(sender.sent) == 3


async def test_tokens_are_counted_by_chunks_where_the_server_does_not() -> None:
    clock = JumpingClock()
    sender = FakeSender(clock, replace(OUTCOME, usage=None))
    sender.release.set()
    records, _, _ = await run(LoadRunner(plan(0.0), sender, clock, None, NoWatch()))
    assert (records[0].output_tokens, records[0].counted, records[0].prompt_tokens) == (2, False, 0)


def test_nobody_wakes_up_too_early() -> None:
    """uvloop rounds to milliseconds, down as well: a request sent before it is due has a TTFT that is too good."""

    async def early_s() -> list[float]:
        clock, found = RealClock(), []
        for part in range(5):
            at_s = clock.now_s() + 0.0003 * part
            await clock.sleep_until(at_s)
            found.append(at_s - clock.now_s())
        return found

    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        assert max(runner.run(early_s())) <= 0
