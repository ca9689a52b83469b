"""worker.io_thread, turn by turn without its thread, and how it shares the interpreter with the worker's loop."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

from baton.kvtransfer.blocks.events import EventLog
from baton.kvtransfer.protocol.exchange import SenderEnded
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
from baton.worker.io_thread import MAX_WAIT_S, FromProxy, IoThread, IoThreadDied

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
    """Gives what tests put into it, keeps what is sent; `gate` holds each send back while it is closed."""

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
    """Keeps the messages of peers; it has nothing to do by itself."""

    sockets: tuple[object, ...] = ()

    def __init__(self) -> None:
        self.counters = TransferCounters()
        self.events: list[Any] = []
        self.messages: list[tuple[str, Message]] = []
        self.ticks = 0
        self.closed = False

    def on_message(self, peer: str, message: Message, now: float) -> None:
        self.messages.append((peer, message))

    def tick(self, now: float) -> None:
        self.ticks += 1

    def wake_at(self, now: float) -> float:
        return float("inf")

    def close(self) -> None:
        self.closed = True


class Bench:
    """An I/O thread that has joined its proxy. Its clock moves by `tick_s` at each look."""

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


# ---- what comes in


def test_a_proxys_messages_go_to_the_loop_with_their_time(bench: Bench) -> None:
    """Guards the stages of a request: the loop looks into its inbox only between two steps."""
    bench.now_s = 3.0
    bench.turn(("proxy", CANCEL))
    assert bench.io.receive(0.0) == [FromProxy("proxy", CANCEL, 3.0)]
    assert not bench.exchange.messages


def test_a_peer_is_no_proxy(bench: Bench) -> None:
    """Guards against a worker that cancels requests, or drains others: only the links to proxies may."""
    bench.turn(("p/1", CANCEL), ("p/1", Drain()))
    assert bench.io.receive(0.0) == []
    assert [peer for peer, _ in bench.exchange.messages] == ["p/1", "p/1"]


def test_what_the_exchange_says_comes_once(bench: Bench) -> None:
    """Guards against an event that ends a lease twice."""
    ended = SenderEnded(LegKey("a", 0), True, "", 1, 0.5)
    bench.exchange.events.append(ended)
    bench.turn()
    bench.turn()
    assert bench.io.receive(0.0) == [ended] and bench.exchange.ticks == 3


def test_a_silent_proxy_is_lost(bench: Bench) -> None:
    """Guards requests whose proxy is gone: the loop must hear of it."""
    bench.now_s = PROXY_LEASE_S + 1.0
    bench.turn()
    assert bench.io.receive(0.0) == [ProxyLost("proxy")]


# ---- what goes out


def test_messages_and_commands_are_done_in_order(bench: Bench) -> None:
    """Guards hand-over: the offer of the last blocks goes before the token, and clients' tokens before both."""
    order: list[str] = []
    bench.io.do(lambda exchange, now: order.append("first"))
    bench.io.do(lambda exchange, now: order.append("second"))
    bench.io.send("proxy", CANCEL, Drain())
    bench.turn()
    assert order == ["first", "second"] and [message for _, message in bench.line.sent] == [CANCEL, Drain()]


def test_a_heartbeat_carries_the_last_report_and_its_age(bench: Bench) -> None:
    """Guards the router's view: the load, and how long ago the loop looked for requests."""
    bench.now_s = 1.0
    bench.io.report(Load(running=3), 0.75)
    bench.turn()
    (beat,) = bench.sent(Heartbeat)
    assert (beat.load.running, beat.load_age_s, beat.draining) == (3, 0.25, False)
    assert bench.io.heartbeat_at == 1.0 + HEARTBEAT_S


def test_a_drained_worker_says_so_in_its_heartbeats(bench: Bench) -> None:
    """Guards against requests that are sent to a worker which leaves."""
    bench.io.drain()
    bench.now_s = 1.0
    bench.turn()
    assert [beat.draining for beat in bench.sent(Heartbeat)] == [True]


def test_gained_blocks_are_sent_and_sent_again_on_request(bench: Bench) -> None:
    """Guards the router's index: batches have numbers, and a lost one is sent once more."""
    bench.events.journal("gpu").stored(b"h" * 32)
    bench.now_s = 1.0
    bench.turn()
    (batch,) = bench.sent(KvEvents)
    assert batch.seq == 1
    bench.turn(("proxy", KvReplay(seq=1)))
    assert bench.sent(KvEvents) == [batch, batch]


def test_the_thread_sleeps_until_something_is_due(bench: Bench) -> None:
    """Guards both: a heartbeat that comes late, and a thread that spins."""
    bench.turn()
    assert bench.io.wake_at == bench.io.heartbeat_at
    assert max(bench.line.waited) <= MAX_WAIT_S
    bench.io.do(lambda exchange, now: None)
    assert bench.io.wake_at == bench.now_s


# ---- the thread


def test_stop_says_goodbye_after_all_messages(bench: Bench) -> None:
    """Guards the last answers of a worker that leaves, and the proxy against waiting for its lease."""
    bench.io.start()
    bench.io.send("proxy", CANCEL)
    bench.io.stop()
    assert [type(message) for _, message in bench.line.sent if not isinstance(message, Heartbeat)] == [Cancel, Goodbye]
    assert bench.line.closed and bench.exchange.closed


def test_a_failure_of_the_thread_reaches_the_loop(bench: Bench) -> None:
    """Guards against a worker that goes on without its sockets."""

    def fail(exchange: object, now: float) -> None:
        raise RuntimeError("a bug")

    bench.io.do(fail)
    bench.io.start()
    (died,) = bench.io.receive(30.0)
    assert isinstance(died, IoThreadDied) and str(died.error) == "a bug"
    bench.io.stop()
    assert bench.line.closed


def test_yield_gil_waits_until_the_io_thread_has_done_its_work(bench: Bench) -> None:
    """Guards hand-over: its messages leave before the loop launches the next step for milliseconds."""
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
