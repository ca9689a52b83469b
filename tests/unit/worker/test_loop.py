"""worker.loop over a recording role: requests, refusals, deadlines, order of steps, load, draining."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded, SenderEnded
from baton.kvtransfer.store.events import StoreClientDied
from baton.models.batch import Drawn
from baton.node.counters import WorkerCounters
from baton.node.errors import InvariantBroken
from baton.node.leg import LegKey
from baton.node.membership import JoinRefused, ProxyLost
from baton.node.messages.control import (
    Busy,
    Cancel,
    Cancelled,
    Drain,
    Failed,
    Prefill,
    Reserve,
)
from baton.tests.unit.worker.bench import ManualRunner, RecordingIo, parts_of, reserve
from baton.worker.in_flight import InFlightStep, InFlightSteps
from baton.worker.io_thread import FromProxy, IoThreadDied, Terminated
from baton.worker.loop import DRAIN_NOTICE_S, LOAD_LEAD_S, Draining, Loop, RoleReport
from baton.worker.parts import Parts
from baton.worker.sequence import Sequence, busy


class RecordingRole:
    """A role that accepts everything, launches a set number of steps, and records the loop's calls."""

    name = "role"

    def __init__(self, parts: Parts) -> None:
        self.sequences: dict[LegKey, Sequence] = {}
        self.steps = InFlightSteps(parts.runner, parts.manager, parts.clock)
        self.counters = WorkerCounters()
        self.launch_at = 0.0
        self.answer: Busy | Failed | None = None
        self.to_launch = 0
        self.events: list[Any] = []
        self.ended: list[tuple[str, Failed | Cancelled | None]] = []
        self.taken_in: list[InFlightStep] = []
        self._io = parts.io

    @property
    def idle(self) -> bool:
        return not self.sequences

    def accept(self, sequence: Sequence, message: Prefill | Reserve) -> Busy | Failed | None:
        if self.answer is None:
            self.sequences[sequence.leg] = sequence
        return self.answer

    def cancel(self, link: str, message: Cancel) -> None:
        self.events.append((link, message))

    def end(self, sequence: Sequence, answer: Failed | Cancelled | None) -> None:
        del self.sequences[sequence.leg]
        self.ended.append((sequence.leg.request_id, answer))
        if answer is not None:
            self._io.send(sequence.link, answer)

    def proxy_lost(self, link: str) -> None:
        self.events.append(ProxyLost(link))

    def on_event(self, event: Any) -> None:
        self.events.append(event)

    def launch(self) -> bool:
        if not self.to_launch:
            return False
        self.to_launch -= 1
        self.steps.launch([])
        return True

    def take_in(self, step: InFlightStep, drawn: list[Drawn | None]) -> None:
        self.taken_in.append(step)

    def report(self) -> RoleReport:
        return RoleReport(len(self.sequences), 2, 3, 4.0)


class Bench:
    """A loop without a real role or I/O, with room for two requests."""

    def __init__(self, run_ahead: int = 0, drain_s: float = 30.0) -> None:
        self.io, self.runner, self.now_s = RecordingIo(), ManualRunner(run_ahead), 1000.0
        self.manager = BlockManager(8)
        self.parts = parts_of(self.runner, self.io, self.manager, lambda: self.now_s, max_model_len=20)
        self.role = RecordingRole(self.parts)
        self.loop = Loop(self.parts, self.role, max_waiting=2, drain_s=drain_s)

    def give(self, *events: Any) -> bool:
        for event in events:
            self.io.inbox.put(event)
        return self.loop.turn(0.0)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# ---- requests


def test_a_request_reaches_the_role_once(bench: Bench) -> None:
    """Guards against computing a duplicate message twice."""
    bench.give(reserve("a"), reserve("a"), reserve("a", attempt=1))
    assert list(bench.role.sequences) == [LegKey("a", 0), LegKey("a", 1)] and not bench.io.sent


def test_an_id_that_another_proxy_uses_is_answered(bench: Bench) -> None:
    """Guards the second proxy against waiting for an answer that goes to the first."""
    bench.give(reserve("a", link="proxy 1"), reserve("a", link="proxy 2"))
    (failed,) = bench.io.of(Failed)
    assert failed.retryable and "another proxy" in failed.reason
    assert bench.role.sequences[LegKey("a", 0)].link == "proxy 1"


def test_the_roles_refusal_is_the_answer(bench: Bench) -> None:
    """Guards the single terminal message of a refused request."""
    bench.role.answer = busy(LegKey("a", 0), "no room")
    bench.give(reserve("a"))
    assert bench.io.sent == [busy(LegKey("a", 0), "no room")] and not bench.role.sequences


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"token_ids": (), "prompt_len": 0, "block_hashes": ()}, "0 tokens"),
        ({"token_ids": tuple(range(20)), "prompt_len": 20, "block_hashes": ()}, "20 tokens"),
        ({"prompt_len": 7}, "a prompt of 7"),
        ({"prompt_len": 0}, "a prompt of 0"),
        ({"token_ids": (1, 1000, 2, 3, 4, 5)}, "vocabulary"),
        ({"block_hashes": (b"h" * 32,) * 2}, "block hashes"),
    ],
)
def test_a_request_that_no_worker_can_serve_fails_for_good(bench: Bench, body: dict[str, Any], reason: str) -> None:
    """Guards the pool and the runner against invalid requests, and the proxy against retrying them."""
    bench.give(reserve("a", **body))
    (failed,) = bench.io.of(Failed)
    assert reason in failed.reason and not failed.retryable and not bench.role.sequences


def test_a_full_queue_is_busy(bench: Bench) -> None:
    """Guards the bound of the queue."""
    bench.give(reserve("a"), reserve("b"), reserve("c"))
    assert [(each.request_id, each.reason) for each in bench.io.of(Busy)] == [("c", "queue is full")]


def test_a_cancel_is_always_answered(bench: Bench) -> None:
    """Guards the proxy's wait for Cancelled, also if the worker does not know the request."""
    cancel = Cancel(request_id="unknown", attempt=3)
    bench.give(FromProxy("proxy", cancel, 0.0))
    assert bench.role.events == [("proxy", cancel)]
    assert bench.io.sent == [Cancelled(request_id="unknown", attempt=3)]


def test_transfer_events_go_to_the_role(bench: Bench) -> None:
    """Guards against an unhandled event, whose blocks would be held forever."""
    events = [
        SenderEnded(LegKey("a", 0), True, "", 1, 0.1),
        KvArrived(b"t", 1, None, 0.0, 0.0, 0.0),
        ReceiverEnded(b"t", "deadline"),
    ]
    bench.give(*events)
    assert bench.role.events == events


# ---- ends


def test_deadlines_end_requests_and_no_others(bench: Bench) -> None:
    """Guards against a request that holds its blocks forever, and one that ends early."""
    bench.give(reserve("late", deadline_s=50.0), reserve("soon", deadline_s=10.0))
    bench.now_s += 9.9
    bench.give()
    assert not bench.role.ended
    bench.now_s += 0.2
    bench.give()
    assert [(name, answer.reason, answer.retryable) for name, answer in bench.role.ended if answer] == [
        ("soon", "deadline", False)
    ]
    bench.now_s += 40.0
    bench.give()
    assert [name for name, _ in bench.role.ended] == ["soon", "late"]


def test_a_deadline_is_found_after_an_earlier_one_is_removed(bench: Bench) -> None:
    """Guards the cached next deadline: its request may have ended, and new requests may arrive."""
    bench.give(reserve("first", deadline_s=10.0))
    bench.role.end(bench.role.sequences[LegKey("first", 0)], None)
    bench.now_s += 11.0
    bench.give(reserve("second", deadline_s=3.0))
    bench.now_s += 4.0
    bench.give()
    assert [name for name, _ in bench.role.ended] == ["first", "second"]


def test_a_lost_proxy_ends_only_its_own_requests(bench: Bench) -> None:
    """Guards the requests of other proxies, and against blocks held by orphaned requests."""
    bench.give(reserve("a", link="proxy 1"), reserve("b", link="proxy 2"), ProxyLost("proxy 1"))
    ((name, answer),) = bench.role.ended
    assert name == "a" and isinstance(answer, Failed) and answer.retryable
    assert list(bench.role.sequences) == [LegKey("b", 0)] and bench.role.events == [ProxyLost("proxy 1")]


def test_a_refused_worker_says_why_and_goes_on(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a worker that ends at one refusal, and against one that waits without a word."""
    with caplog.at_level("WARNING"):
        bench.give(JoinRefused("proxy", "another model", 1.0), reserve("a"))
    assert "another model" in caplog.text
    assert list(bench.role.sequences) == [LegKey("a", 0)]


@pytest.mark.parametrize("died", [IoThreadDied(OSError("gone")), StoreClientDied(OSError("gone"))])
def test_a_dead_thread_ends_the_worker(bench: Bench, died: object) -> None:
    """Guards against a worker that computes what it cannot send: it must crash with the cause."""
    with pytest.raises(InvariantBroken) as caught:
        bench.give(died)
    assert isinstance(caught.value.__cause__, OSError)


# ---- steps


@pytest.mark.parametrize(
    ("run_ahead", "order"),
    [
        (0, ["launch 1", "read 1", "launch 2", "read 2", "launch 3", "read 3"]),
        (1, ["launch 1", "launch 2", "read 1", "launch 3", "read 2", "read 3"]),
        (2, ["launch 1", "launch 2", "launch 3", "read 1", "read 2", "read 3"]),
    ],
)
def test_steps_are_launched_ahead_of_reading(run_ahead: int, order: list[str]) -> None:
    """Guards against an idle device, and against more steps in flight than the runner supports."""
    bench = Bench(run_ahead)
    bench.role.to_launch = 3
    while bench.give():
        assert len(bench.role.steps) <= run_ahead
    assert bench.runner.log == order and len(bench.role.taken_in) == 3


def test_a_step_behind_another_is_launched_late() -> None:
    """Guards new requests, which can join the next step until its launch. The first step is launched at once."""
    bench = Bench(run_ahead=1)
    bench.role.to_launch, bench.role.launch_at = 3, bench.now_s + 0.03
    assert bench.give() and bench.runner.log == ["launch 1"]
    assert not bench.give() and bench.loop.wait_s(0.1) == pytest.approx(0.03)
    bench.now_s += 0.04
    assert bench.loop.wait_s(0.1) == 0.0
    assert bench.give() and bench.runner.log == ["launch 1", "launch 2", "read 1"]


def test_a_worker_without_steps_waits_for_messages(bench: Bench) -> None:
    """Guards against an idle worker that spins."""
    assert not bench.give() and bench.loop.wait_s(0.1) == 0.1


# ---- load


def test_the_load_combines_role_and_pool(bench: Bench) -> None:
    """Guards the router's view, and the names of the counters."""
    bench.role.counters.steps = 5
    bench.manager.evictions = 6
    bench.give(reserve("a"))
    load = bench.io.load
    assert (load.running, load.waiting, load.waiting_tokens, load.prefill_tokens_s) == (1, 2, 3, 4.0)
    assert (load.free_blocks, load.total_blocks, load.steps) == (8, 8, 5)
    assert (load.counters["steps"], load.counters["evictions"], load.counters["transfers_sent"]) == (5.0, 6.0, 0.0)
    assert not [name for name in load.counters if name.startswith("store_")], "there is no store"


def test_the_load_is_built_when_a_heartbeat_is_due(bench: Bench) -> None:
    """Guards the step's speed against building a load each turn, of which heartbeats send one in fifty."""
    bench.io.heartbeat_at = bench.now_s + 0.25
    for _ in range(int(0.25 / 0.005)):
        bench.now_s += 0.005
        bench.give()
    assert 1 <= bench.io.num_reports <= LOAD_LEAD_S / 0.005 + 1
    assert bench.io.last_message_at == bench.now_s


def test_a_long_turn_reports_before_the_heartbeat_is_missed(bench: Bench) -> None:
    """Guards the router against a load that is a heartbeat old: a long turn may end after the heartbeat is due."""
    bench.io.heartbeat_at = bench.now_s + 0.25
    bench.now_s += 0.1
    bench.give()
    assert bench.io.num_reports == 1, "a turn took 0.1 s, and two more end after the heartbeat"


def test_the_load_is_as_old_as_the_last_read_of_the_inbox(bench: Bench) -> None:
    """Guards the router's correction: requests that arrive during a step are not in the load."""
    bench.role.to_launch = 1
    began_at, launch = bench.now_s, bench.role.launch

    def long_step() -> bool:
        bench.now_s += 2.0
        return launch()

    bench.role.launch = long_step  # type: ignore[method-assign]
    bench.give()
    assert bench.io.last_message_at == began_at


# ---- draining


@pytest.mark.parametrize("ask", [FromProxy("proxy", Drain(), 0.0), Terminated()])
def test_a_draining_worker_refuses_requests_and_exits_when_idle(bench: Bench, ask: FromProxy | Terminated) -> None:
    """Guards requests in flight: they get Busy, and the worker exits once the proxies know that it drains."""
    bench.give(ask, ask, reserve("a"))
    assert bench.io.draining and [each.reason for each in bench.io.of(Busy)] == ["draining"]
    bench.io.receive = _clockwork(bench, DRAIN_NOTICE_S / 4)  # type: ignore[method-assign]
    began_at = bench.now_s
    bench.loop.run()
    assert bench.now_s - began_at <= DRAIN_NOTICE_S * 1.5


def test_requests_that_outlast_the_drain_fail_as_retryable() -> None:
    """Guards the terminal message of each leg at shutdown, and against unread steps."""
    bench = Bench(run_ahead=1, drain_s=2.0)
    bench.give(reserve("a"), reserve("b"))
    bench.role.to_launch = 100
    bench.loop.drain()
    bench.io.receive = _clockwork(bench, 0.3)  # type: ignore[method-assign]
    bench.loop.run()
    assert [(each.request_id, each.retryable) for each in bench.io.of(Failed)] == [("a", True), ("b", True)]
    assert not bench.role.steps and len(bench.role.taken_in) == len(bench.runner.rows) > 1


def _clockwork(bench: Bench, tick_s: float) -> Any:
    """An empty inbox that advances the clock at each read."""

    def receive(wait_s: float) -> list[Any]:
        bench.now_s += tick_s
        return []

    return receive


def test_an_idle_worker_stays_until_the_proxies_know_that_it_drains() -> None:
    """Guards requests in flight to a worker that has just begun to drain."""
    draining = Draining(30.0)
    assert not draining.is_over(idle=True, now=1e9)
    assert draining.begin(10.0) and draining.begun
    assert not draining.is_over(idle=True, now=10.0 + DRAIN_NOTICE_S / 2)
    assert draining.is_over(idle=True, now=10.0 + DRAIN_NOTICE_S)


def test_the_drain_time_bounds_the_wait_for_work() -> None:
    """Guards running streams and the bound of the wait; a second SIGTERM does not restart it."""
    draining = Draining(30.0)
    draining.begin(10.0)
    assert not draining.begin(20.0)
    assert not draining.is_over(idle=False, now=39.9)
    assert draining.is_over(idle=False, now=40.0)


def test_a_drain_time_of_zero_ends_at_once() -> None:
    """Guards `--drain-s 0`."""
    draining = Draining(0.0)
    draining.begin(10.0)
    assert draining.is_over(idle=False, now=10.0)


# ---- block accounting


def test_an_idle_worker_that_holds_blocks_fails_its_check(bench: Bench) -> None:
    """Guards against a leak that shows only when the pool is exhausted."""
    bench.loop.check()
    blocks = bench.manager.allocate(2)
    with pytest.raises(InvariantBroken, match="idle role worker holds blocks"):
        bench.loop.check()
    bench.role.sequences[LegKey("a", 0)] = SimpleNamespace()  # type: ignore[assignment]
    bench.loop.check()
    del bench.role.sequences[LegKey("a", 0)]
    bench.manager.quarantine(blocks, b"t")
    bench.loop.check()
