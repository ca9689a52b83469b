"""How a worker's loop and the carrier's thread share the interpreter."""

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


def carrier_of(line: SlowLine) -> IoThread:
    membership = SimpleNamespace(
        links={}, joined=(), wake_at=float("inf"), on_timer=lambda *_, **__: ([], []), farewell=lambda: []
    )
    exchange = SimpleNamespace(
        sockets=[], events=[], tick=lambda now: None, wake_at=lambda now: float("inf"), close=lambda: None
    )
    made: Any = IoThread(line, membership, exchange, EventLog())  # type: ignore[arg-type]
    return made


def test_the_loop_lets_the_carrier_carry_out_what_it_was_told() -> None:
    line = SlowLine()
    carrier = carrier_of(line)
    carrier.start()
    done: list[float] = []
    carrier.tell("proxy", Drain(), Drain())
    carrier.do(lambda exchange, now: done.append(now))
    carrier.let_work(5.0)
    assert len(line.sent) == 2 and len(done) == 1
    carrier.stop()
    assert len(line.sent) == 2 and len(done) == 1


def test_it_waits_for_no_thread_that_does_not_run_and_no_longer_than_it_says() -> None:
    """Guards the loop against a carrier that is stuck, or not started."""
    line = SlowLine()
    carrier = carrier_of(line)
    carrier.tell("proxy", *[Drain()] * 500)
    carrier.let_work(5.0)
    assert not line.sent
    carrier.start()
    carrier.let_work(0.03)
    assert len(line.sent) < 500
    carrier._outbox.clear()
    carrier.stop()
