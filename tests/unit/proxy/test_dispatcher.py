"""The dispatcher: admission in turn, a bounded queue, clear errors while there are no workers. No socket answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec.structs import replace as replace_struct

from baton.node.errors import DeadlineExceeded, Overloaded, PeerLost
from baton.node.messages import versions
from baton.node.messages.base import Message
from baton.node.messages.control import Cancel, Heartbeat, Load, Register, Reserve, SamplingSpec
from baton.proxy.dispatcher import Dispatcher
from baton.proxy.interface import Generation
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.fair_queue import Ticket
from baton.proxy.routing.model_workers import ClusterShape, Leg
from baton.proxy.routing.router import RequestView, Route
from baton.proxy.settings import ProxySettings

GENERATION = Generation(request_id="r", model="m", prompt_ids=(1, 2, 3), sampling=SamplingSpec(max_tokens=4))
NEW, BEGUN = Ticket(refusable=True), Ticket()


class SilentSocket:
    """Takes every message and brings none."""

    identity = "proxy/1"
    address = "inproc://proxy"

    def fileno(self) -> int:
        raise AssertionError("the dispatcher was not started")

    def receive(self, timeout_s: float) -> list[tuple[str, Message]]:
        return []

    def send(self, peer: str, message: Message) -> bool:
        return True

    def close(self) -> None: ...


@pytest.fixture
async def dispatcher() -> Dispatcher:
    return Dispatcher(SilentSocket(), ProxySettings(max_queue=2, local_prefill="always", drain_s=0.0), ["m"])


def _register() -> Register:
    return Register(
        worker="d",
        incarnation=1,
        role="decode",
        model="m",
        namespace=b"n" * 32,
        block_tokens=4,
        total_blocks=100,
        max_num_seqs=2,
        max_model_len=64,
        address="tcp://127.0.0.1:1",
    )


def _join(dispatcher: Dispatcher, free_blocks: int = 100) -> None:
    """A decode worker registers and reports, behind the socket's back."""
    now = time.monotonic()
    assert dispatcher._cluster.join("d/1", _register(), now) == ""
    load = Load(running=1, free_blocks=free_blocks, total_blocks=100)
    dispatcher._cluster.beat("d/1", Heartbeat(worker="d", incarnation=1, load=load), now)
    dispatcher._on_change()


def _view(num_blocks: int = 1) -> Callable[[ClusterShape], RequestView]:
    return lambda shape: RequestView(num_tokens=4, num_blocks=num_blocks, turn=0)


def _soon() -> float:
    return time.monotonic() + 60.0


async def test_requests_are_let_in_in_turn(dispatcher: Dispatcher) -> None:
    """Guards against starvation: a large request that waits for blocks is not overtaken by a small one."""
    _join(dispatcher, free_blocks=1)
    large = asyncio.create_task(dispatcher.admit("m", NEW, _view(50), _soon()))
    await asyncio.sleep(0)
    small = asyncio.create_task(dispatcher.admit("m", NEW, _view(1), _soon()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not large.done() and not small.done()
    _join(dispatcher, free_blocks=100)
    assert isinstance((await large)[0], Route) and isinstance((await small)[0], Route)


async def test_a_full_queue_turns_new_requests_away_and_no_others(dispatcher: Dispatcher) -> None:
    """Guards the bound of the queue, and streams that have begun from it."""
    _join(dispatcher, free_blocks=0)
    waiting = [asyncio.create_task(dispatcher.admit("m", NEW, _view(), _soon())) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await dispatcher.admit("m", NEW, _view(), _soon())
    again = asyncio.create_task(dispatcher.admit("m", BEGUN, _view(), _soon()))
    await asyncio.sleep(0)
    _join(dispatcher)
    routes = await asyncio.gather(*waiting, again)
    assert all(isinstance(route, Route) for route, _ in routes)
    assert dispatcher.counters()["rejected_queue_full_total"] == 1
    assert dispatcher.counters()["queued_requests"] == 0


async def test_a_request_that_no_worker_will_ever_take_fails_at_once(dispatcher: Dispatcher) -> None:
    """Guards the queue: a request with a grammar, where workers make none, holds up no other."""
    _join(dispatcher)
    constrained = RequestView(num_tokens=4, num_blocks=1, turn=0, constrained=True)
    with pytest.raises(PeerLost, match="structured output: decode none"):
        await dispatcher.admit("m", NEW, lambda shape: constrained, _soon())
    assert isinstance((await dispatcher.admit("m", NEW, _view(), _soon()))[0], Route)


async def test_generations_that_follow_others_of_their_request_are_not_turned_away(dispatcher: Dispatcher) -> None:
    """Guards against a request that is refused in mid-answer because others filled the queue meanwhile."""
    _join(dispatcher, free_blocks=0)
    waiting = [asyncio.create_task(dispatcher.admit("m", NEW, _view(), _soon())) for _ in range(2)]
    await asyncio.sleep(0)
    for follows, timeout_s, error in ((False, 60.0, Overloaded), (True, 0.02, DeadlineExceeded)):
        generation = replace(GENERATION, follows=follows)
        with pytest.raises(error):
            await anext(dispatcher.generate(generation, Timeline(time.monotonic), timeout_s=timeout_s))
    for task in waiting:
        task.cancel()
    await _settled()
    assert all(task.cancelled() for task in waiting), "also the one that was woken just before"


async def test_a_computed_prompt_leaves_the_queue(dispatcher: Dispatcher) -> None:
    """Guards the way from a session's first token to what the next request's route is chosen by."""
    _join(dispatcher)
    leg = Leg("d/1", "r", tokens=30, blocks=1, sent_at=time.monotonic() + 1)
    dispatcher.open_leg(leg, Cancel(request_id="r", attempt=0))
    assert dispatcher._cluster.models["m"].view()[0].tokens == 30
    dispatcher.prompt_computed("d/1", "r")
    assert dispatcher._cluster.models["m"].view()[0].tokens == 0


async def test_a_deadline_ends_the_wait_for_room(dispatcher: Dispatcher) -> None:
    """Guards against a request that waits for ever before full workers."""
    _join(dispatcher, free_blocks=0)
    with pytest.raises(DeadlineExceeded):
        await dispatcher.admit("m", NEW, _view(), time.monotonic() + 0.02)
    assert dispatcher.counters()["queued_requests"] == 0


async def test_no_worker_is_an_error_after_a_grace(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against hanging on an empty cluster: the error names the role that is missing."""
    monkeypatch.setattr("baton.proxy.routing.admission.NO_WORKER_GRACE_S", 0.0)
    assert "registered" in dispatcher.ready()
    _join(dispatcher)
    assert dispatcher.ready() == ""
    dispatcher._cluster.lose("d/1")
    with pytest.raises(PeerLost, match="no decode worker"):
        await dispatcher.admit("m", NEW, _view(), _soon())


async def test_nothing_is_left_of_a_request(dispatcher: Dispatcher) -> None:
    """Guards the table of sessions: a failed or closed generation is forgotten, and its id may come again."""
    for _ in range(2):
        with pytest.raises(PeerLost):
            async for _ in dispatcher.generate(GENERATION, Timeline(time.monotonic), timeout_s=60.0):
                pass
    assert dispatcher._sessions == {}


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_light_tenant_is_admitted_before_the_queue_of_a_heavy_one() -> None:
    """Guards the order of admission: who asked for most waits longest, and no request is admitted twice."""
    dispatcher = Dispatcher(SilentSocket(), ProxySettings(local_prefill="always", drain_s=0.0), ["m"])
    _join(dispatcher, free_blocks=0)
    order: list[str] = []

    async def ask(tenant: str, turn: int, priority: int = 0) -> None:
        ticket = Ticket(tenant=tenant, turn=turn, priority=priority, num_tokens=4, cost_tokens=1000, refusable=True)
        await dispatcher.admit("m", ticket, _view(), _soon())
        order.append(f"{tenant}{turn}")
        _join(dispatcher, free_blocks=0)

    tasks = [asyncio.create_task(ask("heavy", turn)) for turn in range(1, 20)]
    await _settled()
    tasks += [asyncio.create_task(ask("light", 20)), asyncio.create_task(ask("heavy", 21, priority=1))]
    await _settled()
    for _ in tasks:
        _join(dispatcher, free_blocks=100)
        await _settled()
    await asyncio.gather(*tasks)
    assert order[:2] in (["heavy21", "light20"], ["light20", "heavy21"])
    assert order[2:] == [f"heavy{turn}" for turn in range(1, 20)]
    assert dispatcher.counters()["queued_requests"] == 0


async def test_a_full_queue_makes_room_for_another_tenant(dispatcher: Dispatcher) -> None:
    """Guards a light tenant against a 429 because of others, and the one turned away against waiting for ever."""
    _join(dispatcher, free_blocks=0)
    heavy = [
        asyncio.create_task(dispatcher.admit("m", Ticket(tenant="heavy", turn=turn, refusable=True), _view(), _soon()))
        for turn in range(2)
    ]
    await _settled()
    light = asyncio.create_task(dispatcher.admit("m", Ticket(tenant="light", refusable=True), _view(), _soon()))
    with pytest.raises(Overloaded, match="have most places"):
        await heavy[1]
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        await dispatcher.admit("m", Ticket(tenant="light", refusable=True), _view(), _soon())
    assert dispatcher.counters()["queued_requests"] == 2
    _join(dispatcher)
    assert isinstance((await heavy[0])[0], Route) and isinstance((await light)[0], Route)


async def test_a_tenant_with_its_share_is_passed_over() -> None:
    """Guards against a light tenant that waits behind a heavy one which may have no more at the workers."""
    dispatcher = Dispatcher(SilentSocket(), ProxySettings(local_prefill="always", drain_s=0.0), ["m"])
    _join(dispatcher)
    shares = dispatcher._cluster.models["m"].shares
    shares.see("light", time.monotonic())
    leg = Leg("d/1", "r", tokens=100_000, blocks=1, sent_at=0.0, tenant="heavy")
    dispatcher.open_leg(leg, Cancel(request_id="r", attempt=0))
    heavy = asyncio.create_task(
        dispatcher.admit("m", Ticket(tenant="heavy", num_tokens=9, cost_tokens=1), _view(), _soon())
    )
    await _settled()
    assert not heavy.done()
    light = Ticket(tenant="light", num_tokens=4, cost_tokens=10**6)
    assert isinstance((await dispatcher.admit("m", light, _view(), _soon()))[0], Route)
    await _settled()
    assert not heavy.done()
    dispatcher.prompt_computed("d/1", "r")
    dispatcher.close_leg("d/1", "r", computed=True)
    assert isinstance((await heavy)[0], Route)


async def test_a_lost_worker_leaves_nothing_of_a_tenant(dispatcher: Dispatcher) -> None:
    """Guards against a tenant that is held back for ever by what a dead worker had."""
    _join(dispatcher)
    dispatcher.open_leg(
        Leg("d/1", "r", tokens=30, blocks=7, sent_at=time.monotonic(), tenant="a"), Cancel(request_id="r", attempt=0)
    )
    held = dispatcher._cluster.models["m"].shares._held["a"]
    assert (held.rows, held.blocks, held.prompts, held.tokens) == (1, 7, 1, 30)
    dispatcher._cluster.lose("d/1")
    dispatcher.close_leg("d/1", "r", computed=False)
    assert (held.rows, held.blocks, held.prompts, held.tokens) == (0, 0, 0, 0)


async def test_a_request_that_a_worker_of_the_version_before_cannot_serve_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards an answer that would ignore a parameter, and the worker, which is well: it is not lost."""
    monkeypatch.setitem(versions.NEW_FIELDS, Reserve, (versions.NewField("body.deadline_s", needed=True),))
    made = Dispatcher(SilentSocket(), ProxySettings(local_prefill="always", max_attempts=1), ["m"])
    made._control._route("d/1", replace_struct(_register(), version=versions.OLDEST_VERSION), time.monotonic())
    with pytest.raises(PeerLost, match="knows no body"):
        await anext(made.generate(GENERATION, Timeline(time.monotonic), timeout_s=60.0))
    assert made.counters()["worker_lost_total"] == 0


def _join_as(dispatcher: Dispatcher, worker: str, role: str, revision: str, namespace: bytes = b"n" * 32) -> None:
    register = replace_struct(_register(), worker=worker, role=role, revision=revision, namespace=namespace)
    assert dispatcher._cluster.join(f"{worker}/1", register, time.monotonic()) == ""


async def test_workers_of_two_revisions_are_never_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a rolling update: KV of one revision may be wrong in the other, though both have the same namespace."""
    monkeypatch.setattr("baton.proxy.routing.admission.NO_WORKER_GRACE_S", 0.0)
    made = Dispatcher(SilentSocket(), ProxySettings(local_prefill="never"), ["m"])
    _join_as(made, "p0", "prefill", "old")
    _join_as(made, "d1", "decode", "new")
    with pytest.raises(PeerLost):
        await made.admit("m", NEW, _view(), _soon())
    _join_as(made, "d0", "decode", "old")
    _join_as(made, "p1", "prefill", "new")
    pairs = set()
    for turn in range(4):
        view = RequestView(num_tokens=4, num_blocks=1, turn=turn)
        route, _ = await made.admit("m", NEW, lambda shape, view=view: view, _soon())  # type: ignore[misc]
        assert route.prefill is not None
        pairs.add((route.prefill.identity, route.decode.identity))
    assert pairs == {("p0/1", "d0/1"), ("p1/1", "d1/1")}
    assert made.dispatched() == {"m": {"old": 2, "new": 2}}


async def test_an_answer_is_not_continued_by_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a stream whose worker is lost in a rolling update: tokens of two models would be in one answer. It waits
    for a worker of its own namespace, and fails where none comes."""
    made = Dispatcher(SilentSocket(), ProxySettings(local_prefill="always"), ["m"])
    _join_as(made, "d0", "decode", "old")
    _join_as(made, "d1", "decode", "new", b"m" * 32)

    def view_of(shape: ClusterShape) -> RequestView | None:
        return RequestView(4, 1, turn=0) if shape.namespace == b"n" * 32 else None

    route, shape = await made.admit("m", BEGUN, view_of, _soon())
    assert route.decode.identity == "d0/1" and shape.namespace == b"n" * 32
    made._cluster.lose("d0/1")
    waiting = asyncio.create_task(made.admit("m", BEGUN, view_of, _soon()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    monkeypatch.setattr("baton.proxy.routing.admission.NO_WORKER_GRACE_S", 0.0)
    with pytest.raises(PeerLost):
        await waiting
