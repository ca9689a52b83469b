"""proxy.session: what happens to a request when a leg is busy, fails, dies, lies or is late; both legs always close."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from baton.node.errors import BadRequest, DeadlineExceeded, PeerLost
from baton.node.messages.base import Message
from baton.node.messages.control import (
    Busy,
    Cancel,
    Cancelled,
    Failed,
    HandedOver,
    Prefill,
    Reserve,
    Reserved,
    SamplingParams,
    Stages,
    Tokens,
)
from baton.proxy.interface import Delta
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.cluster import Leg, Shape
from baton.proxy.routing.router import RequestView, Route, WorkerView
from baton.proxy.session import Session, WorkerLost

SAMPLING = SamplingParams(max_tokens=8, seed=5)
PROMPT = (1, 2, 3, 4, 5)


def _view(identity: str) -> WorkerView:
    return WorkerView(identity, f"tcp://{identity}", identity[0], False, 0, 0, 100, 100, 8, 1000.0)


class ScriptedDesk:
    """Plays dispatcher and workers: `script(worker, message)` answers what a worker was sent."""

    def __init__(self, script: Callable[[str, Message], list[Any]], *, local: bool = False) -> None:
        self.session: Session | None = None
        self.sent: list[tuple[str, Message]] = []
        self.open_legs: set[tuple[str, str]] = set()
        self.admitted: list[RequestView] = []
        self.counted: Counter[str] = Counter()
        self.legs: list[Leg] = []
        self.computed: dict[str, bool] = {}
        self.first_tokens: list[str] = []
        self.hit_tokens = 0
        self._script = script
        self._local = local

    async def admit(self, request: RequestView, deadline: float, *, first: bool) -> Route:
        assert first == (not self.admitted), "only the first attempt may be turned away by a full queue"
        self.admitted.append(request)
        decode = "d1" if "d0" in request.avoid else "d0"
        prefill = "p1" if "p0" in request.avoid else "p0"
        return Route(_view(decode), None if self._local else _view(prefill), "test", hit_tokens=self.hit_tokens)

    def shape(self) -> Shape:
        return Shape(b"n" * 32, 4, 64)

    def send(self, worker: str, message: Message) -> bool:
        self.sent.append((worker, message))
        assert self.session is not None
        for answer in self._script(worker, message):
            self.session.inbox.put_nowait(answer if isinstance(answer, WorkerLost | tuple) else (worker, answer))
        return True

    def assign(self, leg: Leg) -> None:
        self.legs.append(leg)
        self.open_legs.add((leg.worker, leg.request_id))

    def prompt_computed(self, worker: str, request_id: str) -> None:
        self.first_tokens.append(worker)

    def settle(self, worker: str, request_id: str, *, computed: bool) -> None:
        self.computed[worker] = computed
        self.open_legs.discard((worker, request_id))

    def count(self, name: str, amount: int = 1) -> None:
        self.counted[name] += amount

    def sent_of(self, kind: type[Message]) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]


def _tokens(index: int, *ids: int, attempt: int = 0, finish: str = "") -> Tokens:
    return Tokens(request_id="r", attempt=attempt, index=index, ids=ids, finish=finish)  # type: ignore[arg-type]


async def _run(
    desk: ScriptedDesk, timeout_s: float = 5.0, max_attempts: int = 3, timeline: Timeline | None = None
) -> list[Delta]:
    desk.session = Session(
        desk,
        "r",
        PROMPT,
        SAMPLING,
        deadline=time.monotonic() + timeout_s,
        priority=0,
        turn=0,
        max_attempts=max_attempts,
        timeline=timeline or Timeline(time.monotonic),
    )
    deltas = []
    async with aclosing(desk.session.run()) as run:
        async for delta in run:
            deltas.append(delta)
    assert not desk.open_legs, "a leg is still counted"
    return deltas


def _ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.ids]


async def test_both_legs_go_out_at_once_and_tokens_come_back_once() -> None:
    """Guards steps 4 to 9: both messages carry the same hashes; decode's repetition of the first token is dropped."""

    def script(worker: str, message: Message) -> list[Any]:
        match message:
            case Prefill():
                return [_tokens(0, 10), HandedOver(request_id="r", attempt=0, sent_bytes=1, transfer_s=0.1)]
            case Reserve():
                return [Reserved(request_id="r", attempt=0, cached_tokens=0)]
        return []

    desk = ScriptedDesk(script)
    task = asyncio.create_task(_run(desk))
    while len(desk.sent) < 2:
        await asyncio.sleep(0)
    assert desk.session is not None
    desk.session.inbox.put_nowait(("d0", _tokens(0, 10, 11)))
    desk.session.inbox.put_nowait(("d0", _tokens(2, 12, finish="length")))
    assert _ids(await task) == [10, 11, 12]
    (reserve,), (prefill,) = desk.sent_of(Reserve), desk.sent_of(Prefill)
    assert reserve.body == prefill.body and len(reserve.body.block_hashes) == 1
    assert (reserve.prefill, prefill.decode, prefill.decode_address) == ("p0", "d0", "tcp://d0")
    assert desk.sent_of(Cancel) == []  # both legs have ended by themselves
    assert desk.first_tokens == ["p0"]  # told once, of the worker that computed the prompt


async def test_a_lost_decode_worker_in_mid_stream() -> None:
    """Guards migration: the new attempt starts from the accepted tokens, elsewhere, with the same seed."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [_tokens(0, 10, 11), WorkerLost("d0", "killed")]
        if isinstance(message, Reserve):
            return [_tokens(1, 99, attempt=0), _tokens(2, 12, attempt=1, finish="stop")]
        return []

    desk = ScriptedDesk(script)
    assert _ids(await _run(desk)) == [10, 11, 12]
    second = desk.sent_of(Reserve)[1]
    assert second.body.token_ids == (*PROMPT, 10, 11) and second.body.prompt_len == len(PROMPT)
    assert second.body.sampling == SAMPLING and desk.admitted[1].avoid == {"d0"}
    assert [(w, m.attempt) for w, m in desk.sent if isinstance(m, Cancel)] == [("p0", 0), ("p0", 1)]


async def test_a_lost_prefill_worker_matters_only_before_decode_streams() -> None:
    """Guards both sides of the hand-over: after it the death of prefill is nobody's business."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [_tokens(0, 10, 11), WorkerLost("p0", "killed"), _tokens(2, 12, finish="stop")]
        return []

    desk = ScriptedDesk(script)
    assert _ids(await _run(desk)) == [10, 11, 12]
    assert len(desk.sent_of(Reserve)) == 1

    def early(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill) and message.attempt == 0:
            return [WorkerLost("p0", "killed")]
        if isinstance(message, Reserve) and message.attempt == 1:
            return [_tokens(0, 7, attempt=1, finish="stop")]
        return []

    desk = ScriptedDesk(early)
    assert _ids(await _run(desk)) == [7]
    assert desk.admitted[1].avoid == {"p0"}


async def test_the_timeline_holds_every_attempt() -> None:
    """Guards what an operator is told: who failed and why, whose stages count, and what prefill's leg has moved."""

    def script(worker: str, message: Message) -> list[Any]:
        attempt = getattr(message, "attempt", 0)
        leg = {"request_id": "r", "attempt": attempt}
        if isinstance(message, Reserve) and attempt == 0:
            return [Busy(**leg, reason="full")]
        if isinstance(message, Reserve) and attempt == 1:
            return [WorkerLost(worker, "killed")]
        if isinstance(message, Prefill) and attempt == 2:
            told = Tokens(**leg, index=0, ids=(7,), stages=Stages(queue_s=1e6))
            moved = HandedOver(**leg, sent_bytes=64, transfer_s=0.5)
            return [told, moved, _tokens(1, 8, attempt=2, finish="stop")]
        return []

    now = iter(range(1000))
    timeline = Timeline(lambda: float(next(now)))
    desk = ScriptedDesk(script)
    task = asyncio.create_task(_run(desk, timeline=timeline))
    assert _ids(await task) == [7, 8]
    timeline.end(finished=True)
    stages = dict(timeline.segments[0].stages)
    assert stages["retry"] > 0.0 and stages["queue"] > 0.0 and stages["prefill_queue"] > 0.0
    assert [bool(attempt.end) for attempt in timeline.attempts] == [True, True, False]
    assert timeline.num_attempts == 3 and len(timeline.prefix_hash) == 32
    assert [(attempt.handed_over, attempt.sent_bytes) for attempt in timeline.attempts] == [
        (False, 0),
        (False, 0),
        (True, 64),
    ]


async def test_busy_is_no_failure() -> None:
    """Guards admission races: any number of Busy answers costs time only, and the other leg is cancelled each time."""
    answers = iter(range(10))

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            number = next(answers)
            if number < 6:
                return [Busy(request_id="r", attempt=message.attempt, reason="full")]
            return [_tokens(0, 7, attempt=message.attempt, finish="stop")]
        return []

    desk = ScriptedDesk(script)
    assert _ids(await _run(desk, max_attempts=2)) == [7]
    cancelled = [(worker, message.attempt) for worker, message in desk.sent if isinstance(message, Cancel)]
    assert [attempt for _, attempt in cancelled] == list(range(7))


async def test_failures_end_after_so_many_attempts() -> None:
    """Guards against a request that takes one worker after the other with it."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            return [Failed(request_id="r", attempt=message.attempt, reason="broken", retryable=True)]
        return []

    desk = ScriptedDesk(script)
    with pytest.raises(PeerLost, match="3 attempts"):
        await _run(desk)
    assert len(desk.sent_of(Reserve)) == 3 and not desk.open_legs
    assert not any(desk.computed.values())


async def test_a_request_that_cannot_be_is_the_clients_fault() -> None:
    """Guards against retrying what no worker can do."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            return [Failed(request_id="r", attempt=0, reason="too long", retryable=False)]
        return []

    desk = ScriptedDesk(script)
    with pytest.raises(BadRequest, match="too long"):
        await _run(desk)
    assert len(desk.sent_of(Reserve)) == 1 and not desk.open_legs


async def test_a_gap_starts_anew() -> None:
    """Guards against a lost message of tokens: nothing after the gap is given out."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            if message.attempt == 0:
                return [_tokens(0, 10), _tokens(2, 12)]
            return [_tokens(1, 11, attempt=1, finish="stop")]
        return []

    assert _ids(await _run(ScriptedDesk(script))) == [10, 11]


async def test_strangers_are_not_listened_to() -> None:
    """Guards against messages about this request from a worker that has no leg of it."""

    def script(worker: str, message: Message) -> list[Any]:
        return [_tokens(0, 7, finish="stop")] if isinstance(message, Reserve) else []

    desk = ScriptedDesk(script, local=True)
    original = desk.send

    def send(worker: str, message: Message) -> bool:
        assert desk.session is not None
        desk.session.inbox.put_nowait(("x9", _tokens(0, 66, finish="stop")))
        desk.session.inbox.put_nowait(("x9", Cancelled(request_id="r", attempt=0)))
        return original(worker, message)

    desk.send = send  # type: ignore[method-assign]
    assert _ids(await _run(desk)) == [7]
    assert desk.sent_of(Prefill) == [] and desk.sent_of(Reserve)[0].prefill == ""
    assert desk.first_tokens == ["d0"]


async def test_the_deadline_ends_a_silent_request() -> None:
    """Guards every wait: workers that say nothing cost no more than the deadline, and are told to stop."""
    desk = ScriptedDesk(lambda worker, message: [])
    with pytest.raises(DeadlineExceeded):
        await _run(desk, timeout_s=0.05)
    assert {worker for worker, message in desk.sent if isinstance(message, Cancel)} == {"p0", "d0"}
    assert not desk.open_legs


async def test_a_client_that_goes_away_cancels_both_legs() -> None:
    """Guards step 10 on the way out through aclose."""

    def script(worker: str, message: Message) -> list[Any]:
        return [_tokens(0, 10)] if isinstance(message, Prefill) else []

    desk = ScriptedDesk(script)
    desk.session = Session(
        desk,
        "r",
        PROMPT,
        SAMPLING,
        deadline=time.monotonic() + 5,
        priority=0,
        turn=0,
        max_attempts=2,
        timeline=Timeline(time.monotonic),
    )
    run = desk.session.run()
    assert (await anext(run)).ids == (10,)
    await run.aclose()
    assert {worker for worker, message in desk.sent if isinstance(message, Cancel)} == {"p0", "d0"}
    assert not desk.open_legs


async def test_what_the_router_foresaw_is_compared_with_what_the_worker_found() -> None:
    """Guards the counters by which wrong predictions are seen, and the work that is counted at dispatch."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill):
            told = Tokens(request_id="r", attempt=0, index=0, ids=(7,), cached_tokens=1)
            return [told, _tokens(1, 8, finish="stop")]
        return []

    desk = ScriptedDesk(script)
    desk.hit_tokens = 4
    assert _ids(await _run(desk)) == [7, 8]
    kinds = ("predicted", "actual", "missed", "unforeseen")
    assert [desk.counted[f"kv_hit_{kind}_tokens_total"] for kind in kinds] == [4, 1, 3, 0]
    (view,) = desk.admitted
    assert len(view.hashes) == 1 and view.block_tokens == 4
    decode, prefill = desk.legs
    assert (decode.tokens, decode.hashes) == (0, ())
    assert (prefill.tokens, prefill.hashes) == (1, view.hashes)
    assert desk.computed == {"p0": True, "d0": True}


async def test_a_decode_leg_that_ends_before_the_finish_of_prefill_is_told() -> None:
    """Guards requests that finish at their first token: whose word comes first does not matter."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill):
            return [("d0", Cancelled(request_id="r", attempt=0)), _tokens(0, 7, finish="length")]
        return []

    desk = ScriptedDesk(script)
    assert _ids(await _run(desk)) == [7]
    assert len(desk.sent_of(Reserve)) == 1
