"""worker.io_thread: its turns without a thread, and how it shares the GIL with the worker's loop."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

from baton.kvtransfer.blocks.events import EventLog
from baton.kvtransfer.protocol.events import SenderEnded
from baton.node.counters import TransferCounters
from baton.node.leg import LegKey
from baton.node.membership import HEARTBEAT_S, PROXY_LEASE_S, Joined, Membership, ProxyLost
from baton.node.messages.base import Message
from baton.node.messages.control import (
    Cancel,
    Drain,
    Goodbye,
    Heartbeat,
    KvEvents,
    KvReplay,
    Load,
    Register,
    Registered,
)
from baton.worker.io_thread import MAX_WAIT_S, FromProxy, IoThread, IoThreadDied, Terminated

REGISTER = Register(
    worker="d",
    incarnation=1,
    role="decode",
    model="m",
    namespace=b"n" * 32,
    block_tokens=16,
    total_blocks=5,
    max_num_seqs=8,
    max_model_len=512,
    address="tcp://x",
)
CANCEL = Cancel(request_id="a", attempt=0)


class ScriptedLine:
    """An endpoint with scripted input that records what is sent; while `gate` is closed, sends block."""

    def __init__(self) -> None:
        self.inbound: list[tuple[str, Message]] = []
        self.sent: list[tuple[str, Message]] = []
        self.waited: list[float] = []
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self._woken = threading.Event()

    def receive(self, timeout_s: float, also: Iterable[object] = ()) -> list[tuple[str, Message]]:
        self.waited.append(timeout_s)
        self._woken.wait(timeout_s)
        self._woken.clear()
        inbound, self.inbound = self.inbound, []
        return inbound

    def send(self, peer: str, message: Message) -> bool:
        self.gate.wait()
        self.sent.append((peer, message))
        return True

    def wake(self) -> None:
        self._woken.set()

    def linger(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class QuietExchange:
    """An exchange that records the messages of peers and has no timers."""

    sockets: tuple[object, ...] = ()
    silent_peers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.counters = TransferCounters()
        self.events: list[Any] = []
        self.messages: list[tuple[str, Message]] = []
        self.met: list[tuple[str, str]] = []
        self.ticks = 0
        self.closed = False

    def meet(self, peer: str, address: str, now: float) -> None:
        self.met.append((peer, address))

    def on_message(self, peer: str, message: Message, now: float) -> None:
        self.messages.append((peer, message))

    def tick(self, now: float) -> None:
        self.ticks += 1

    def wake_at(self, now: float) -> float:
        return float("inf")

    def close(self) -> None:
        self.closed = True


class Bench:
    """An I/O thread that has joined its proxy. Each read of its clock advances it by `tick_s`."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.line, self.exchange, self.events = ScriptedLine(), QuietExchange(), EventLog()
        self.now_s, self.tick_s = 0.0, tick_s
        self.membership = Membership(REGISTER, ("proxy",), 0.0)
        self.io = IoThread(self.line, self.membership, self.exchange, self.events, self.clock)  # type: ignore[arg-type]

    def clock(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    def join(self) -> None:
        self.turn(("proxy", Registered(proxy="proxy", incarnation=7)))
        assert self.io.receive(0.0) == [Joined("proxy")]
        self.line.sent.clear()

    def turn(self, *inbound: tuple[str, Message]) -> None:
        self.line.inbound += inbound
        self.line.wake()
        self.io.turn()

    def sent(self, kind: type[Message]) -> list[Any]:
        return [message for _, message in self.line.sent if isinstance(message, kind)]


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.join()
    return bench


# ---- input


def test_a_proxys_messages_go_to_the_loop_with_their_time(bench: Bench) -> None:
    """Guards a request's stages: the loop reads its inbox only between steps, so arrival times are taken here."""
    bench.now_s = 3.0
    bench.turn(("proxy", CANCEL))
    assert bench.io.receive(0.0) == [FromProxy("proxy", CANCEL, 3.0)]
    assert not bench.exchange.messages


def test_named_peers_are_met_at_once(bench: Bench) -> None:
    """Guards the first hand-over against waiting until its two workers know each other."""
    bench.turn(("proxy", Registered(proxy="proxy", incarnation=7, peers=(("m1/1", "tcp://m1"),))))
    assert bench.exchange.met == [("m1/1", "tcp://m1")]


def test_a_peer_cannot_act_as_a_proxy(bench: Bench) -> None:
    """Guards against a peer that cancels requests or drains a worker: only links to proxies may."""
    bench.turn(("p/1", CANCEL), ("p/1", Drain()))
    assert bench.io.receive(0.0) == []
    assert [peer for peer, _ in bench.exchange.messages] == ["p/1", "p/1"]


def test_events_of_the_exchange_are_delivered_once(bench: Bench) -> None:
    """Guards against an event that ends a lease twice."""
    ended = SenderEnded(LegKey("a", 0), True, "", 1, 0.5)
    bench.exchange.events.append(ended)
    bench.turn()
    bench.turn()
    assert bench.io.receive(0.0) == [ended] and bench.exchange.ticks == 3


def test_a_silent_proxy_is_lost(bench: Bench) -> None:
    """Guards against requests that outlive their proxy: the loop must be notified."""
    bench.now_s = PROXY_LEASE_S + 1.0
    bench.turn()
    assert bench.io.receive(0.0) == [ProxyLost("proxy")]


# ---- output


def test_messages_and_commands_are_done_in_order(bench: Bench) -> None:
    """Guards hand-over: clients' tokens go first, then the offer of the last blocks, then the first token."""
    order: list[str] = []
    bench.io.do(lambda exchange, now: order.append("first"))
    bench.io.do(lambda exchange, now: order.append("second"))
    bench.io.send("proxy", CANCEL, Drain())
    bench.turn()
    assert order == ["first", "second"] and [message for _, message in bench.line.sent] == [CANCEL, Drain()]


def test_a_heartbeat_carries_the_last_report_and_its_age(bench: Bench) -> None:
    """Guards the router's view: the load, and the time since the loop last read its inbox."""
    bench.now_s = 1.0
    bench.io.report(Load(running=3), 0.75)
    bench.turn()
    (beat,) = bench.sent(Heartbeat)
    assert (beat.load.running, beat.load_age_s, beat.draining) == (3, 0.25, False)
    assert bench.io.heartbeat_at == 1.0 + HEARTBEAT_S


def test_heartbeats_of_a_draining_worker_carry_the_flag(bench: Bench) -> None:
    """Guards against new requests for a worker that is leaving: the first such heartbeat does not wait its turn."""
    bench.now_s = 1.0
    bench.turn()
    bench.io.drain()
    bench.turn()
    bench.turn()
    assert [beat.draining for beat in bench.sent(Heartbeat)] == [False, True]


def test_a_signal_that_interrupts_a_wake_reaches_the_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a handler that waits for the lock of the method that it has interrupted, in the same thread."""
    monkeypatch.setattr(bench.line, "wake", lambda: pytest.fail("wake takes a lock"))
    bench.io.terminate()
    assert bench.io.receive(0.0) == [Terminated()]


def test_a_signal_ends_readiness_before_the_step_ends(bench: Bench) -> None:
    """Guards against requests, and a ready probe, for a worker that is leaving and still at a long step."""
    assert bench.io.unready == ""
    bench.io.terminate()
    assert bench.io.unready == "draining"
    bench.now_s = 1.0
    bench.turn()
    assert [beat.draining for beat in bench.sent(Heartbeat)] == [True]


def test_a_worker_without_a_proxy_is_not_ready() -> None:
    """Guards a rolling update: a successor that no proxy knows replaces no worker."""
    bench = Bench()
    assert bench.io.unready == "no proxy has accepted this node"
    bench.join()
    assert bench.io.unready == ""
    bench.now_s = PROXY_LEASE_S + 1.0
    bench.turn()
    assert bench.io.unready == "no proxy has accepted this node"


def test_kv_events_are_sent_and_replayed(bench: Bench) -> None:
    """Guards the router's index: batches are numbered, and a lost one is sent again."""
    bench.events.journal("gpu").stored(b"h" * 32)
    bench.now_s = 1.0
    bench.turn()
    (batch,) = bench.sent(KvEvents)
    assert batch.seq == 1
    bench.turn(("proxy", KvReplay(seq=1)))
    assert bench.sent(KvEvents) == [batch, batch]


def test_the_thread_sleeps_until_something_is_due(bench: Bench) -> None:
    """Guards against late heartbeats and against a spinning thread."""
    bench.turn()
    assert bench.io.wake_at == bench.io.heartbeat_at
    assert max(bench.line.waited) <= MAX_WAIT_S
    bench.io.do(lambda exchange, now: None)
    assert bench.io.wake_at == bench.now_s


# ---- the thread


def test_stop_sends_goodbye_after_all_messages(bench: Bench) -> None:
    """Guards the last messages of a leaving worker, and the proxy against waiting for the lease to expire."""
    bench.io.start()
    bench.io.send("proxy", CANCEL)
    bench.io.stop()
    assert [type(message) for _, message in bench.line.sent if not isinstance(message, Heartbeat)] == [Cancel, Goodbye]
    assert bench.line.closed and bench.exchange.closed


def test_a_failure_of_the_thread_reaches_the_loop(bench: Bench) -> None:
    """Guards against a worker that continues without its sockets."""

    def fail(exchange: object, now: float) -> None:
        raise RuntimeError("a bug")

    bench.io.do(fail)
    bench.io.start()
    (died,) = bench.io.receive(30.0)
    assert isinstance(died, IoThreadDied) and str(died.error) == "a bug"
    bench.io.stop()
    assert bench.line.closed


def test_yield_gil_waits_until_the_io_thread_has_done_its_work(bench: Bench) -> None:
    """Guards hand-over: its messages are sent before the loop spends milliseconds on the next launch."""
    bench.io.start()
    done: list[float] = []
    bench.io.send("proxy", CANCEL, Drain())
    bench.io.do(lambda exchange, now: done.append(now))
    bench.io.yield_gil(1e9)
    assert len(bench.line.sent) == 2 and len(done) == 1
    bench.io.stop()
    assert len(done) == 1


def test_yield_gil_returns_when_thread_is_dead_or_timed_out() -> None:
    """Guards the loop against an I/O thread that is stuck, or not started."""
    bench = Bench(tick_s=0.01)
    bench.io.send("proxy", CANCEL)
    bench.io.yield_gil(1e9)
    assert not bench.line.sent
    bench.line.gate.clear()
    bench.io.start()
    bench.io.yield_gil(5.0)
    assert not bench.line.sent, "the thread is stuck in a send"
    bench.line.gate.set()
    bench.io.stop()


def test_every_message_to_a_proxy_is_counted(bench: Bench) -> None:
    """Guards against a loss that is noticed where there was none, and one that is not: a heartbeat says how many
    messages went before it."""
    before = len(bench.line.sent)
    bench.now_s = 1.0
    bench.turn()
    (first,) = bench.sent(Heartbeat)
    bench.events.journal("gpu").stored(b"h" * 32)
    bench.io.send("proxy", CANCEL, CANCEL)
    bench.turn(("proxy", KvReplay(seq=1)))
    bench.now_s = 2.0
    bench.turn()
    second = bench.sent(Heartbeat)[1]
    between = [message for _, message in bench.line.sent[before:]]
    assert second.sent - first.sent == between.index(second) - between.index(first)
