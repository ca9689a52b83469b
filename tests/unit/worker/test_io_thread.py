"""worker.io_thread: how a worker's loop and the I/O thread share the interpreter."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from baton.kvtransfer.blocks.events import EventLog
from baton.node.messages.base import Message
from baton.node.messages.control import Drain
from baton.worker.io_thread import IoThread


class SlowLine:
    """Takes a while for each message, and wakes as an endpoint does."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._woken = threading.Event()

    def receive(self, timeout_s: float, also: Iterable[object] = ()) -> list[tuple[str, Message]]:
        self._woken.wait(timeout_s)
        self._woken.clear()
        return []

    def send(self, peer: str, message: Message) -> bool:
        time.sleep(0.01)
        self.sent.append(message)
        return True

    def wake(self) -> None:
        self._woken.set()

    def linger(self) -> None: ...

    def close(self) -> None: ...


def io_thread_of(line: SlowLine) -> IoThread:
    membership = SimpleNamespace(
        links={}, joined=(), wake_at=float("inf"), on_timer=lambda *_, **__: ([], []), farewell=lambda: []
    )
    exchange = SimpleNamespace(
        sockets=[], events=[], tick=lambda now: None, wake_at=lambda now: float("inf"), close=lambda: None
    )
    made: Any = IoThread(line, membership, exchange, EventLog())  # type: ignore[arg-type]
    return made


def test_yield_gil_waits_until_the_io_thread_has_done_its_work() -> None:
    line = SlowLine()
    io = io_thread_of(line)
    io.start()
    done: list[float] = []
    io.send("proxy", Drain(), Drain())
    io.do(lambda exchange, now: done.append(now))
    io.yield_gil(5.0)
    assert len(line.sent) == 2 and len(done) == 1
    io.stop()
    assert len(line.sent) == 2 and len(done) == 1


def test_yield_gil_returns_when_thread_is_dead_or_timed_out() -> None:
    """Guards the loop against an I/O thread that is stuck, or not started."""
    line = SlowLine()
    io = io_thread_of(line)
    io.send("proxy", *[Drain()] * 500)
    io.yield_gil(5.0)
    assert not line.sent
    io.start()
    io.yield_gil(0.03)
    assert len(line.sent) < 500
    io._outbox.clear()
    io.stop()
