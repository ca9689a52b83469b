"""Which connection is closed for a new one, and when one is too slow, without sockets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.proxy.http.connections import ConnectionLimits, Connections, Phase
from baton.proxy.http.failures import Failure


@dataclass(eq=False)
class Fake:
    """A connection in one phase."""

    phase: Phase
    since_s: float = 0.0
    body_bytes: int = 0
    unsent_bytes: int = 0
    dropped: bool = False
    slow: asyncio.Event = field(default_factory=asyncio.Event)

    def too_slow(self, phase: Phase) -> None:
        self.slow.set()

    def drop(self) -> None:
        self.dropped = True


def connections(max_connections: int = 4, **limits: float) -> tuple[Connections, list[str]]:
    refused: list[str] = []

    def on_refused(reason: str, failure: Failure | None) -> None:
        refused.append(reason)

    return Connections(ConnectionLimits(max_connections, **limits), on_refused), refused


async def test_those_without_a_request_are_closed_first_and_the_oldest_of_them() -> None:
    """Guards against closing a client that sends a request while others send none."""
    made, refused = connections(5)
    order = [Phase.ANSWER, Phase.BODY, Phase.HEAD, Phase.IDLE, Phase.CLOSING]
    fakes = [Fake(phase) for phase in order]
    assert all(made.admit(each) for each in fakes)
    for expected in range(1, len(order)):
        assert made.admit(Fake(Phase.ANSWER))
        assert [each.dropped for each in fakes] == [False] * (5 - expected) + [True] * expected
    assert not made.admit(Fake(Phase.ANSWER))
    assert (len(made), refused) == (5, ["closed_for_another"] * 4)

    made, _ = connections(3)
    idle = [Fake(Phase.IDLE, since_s=since_s) for since_s in (2.0, 1.0, 3.0)]
    assert all(made.admit(each) for each in idle)
    assert made.admit(Fake(Phase.IDLE))
    assert [each.dropped for each in idle] == [False, True, False]


async def test_many_are_closed_at_once() -> None:
    """Guards against looking at all connections for each of a flood of new ones."""
    made, refused = connections(320)
    assert all(made.admit(Fake(Phase.HEAD)) for _ in range(320))
    assert made.admit(Fake(Phase.HEAD))
    assert (len(made), len(refused)) == (301, 20)


async def test_a_body_may_take_as_long_as_its_size_at_the_lowest_rate() -> None:
    """Guards against ending an upload that is large, not slow; and against a sweep that forgets connections."""
    now_s = asyncio.get_running_loop().time()
    made, _ = connections(body_grace_s=10.0, body_bytes_per_s=100.0, sweep_every_s=0.0)
    fast, slow = Fake(Phase.BODY, now_s - 1000.0, body_bytes=100_000), Fake(Phase.BODY, now_s - 1000.0, body_bytes=9000)
    running = Fake(Phase.ANSWER, now_s - 1e6)
    assert all(made.admit(each) for each in (running, fast, slow))
    await asyncio.wait_for(slow.slow.wait(), 20)
    assert not (fast.slow.is_set() or running.slow.is_set())


async def test_what_is_unsent_has_more_time() -> None:
    """Guards against cutting the last answer of a client that reads slowly."""
    now_s = asyncio.get_running_loop().time()
    made, _ = connections(drain_s=1.0, flush_s=100.0, sweep_every_s=0.0)
    reading, done = Fake(Phase.CLOSING, now_s - 50.0, unsent_bytes=1), Fake(Phase.CLOSING, now_s - 50.0)
    assert all(made.admit(each) for each in (reading, done))
    await asyncio.wait_for(done.slow.wait(), 20)
    assert not reading.slow.is_set()
