"""A store and workers in one process, without sockets, threads or clocks: a test delivers the messages."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from baton.kvtransfer.blocks.copies import HostCopies
from baton.kvtransfer.blocks.events import NullJournal
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.store.arena import Arena
from baton.kvtransfer.store.checks import Checks
from baton.kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.kvtransfer.store.lower import LowerTier, NoLowerTier
from baton.kvtransfer.store.peers import Peers
from baton.kvtransfer.store.server import StoreServer
from baton.kvtransfer.store.session import StoreSession
from baton.node.counters import StoreClientCounters
from baton.node.leg import LegKey
from baton.node.messages.base import Message, encode
from baton.node.messages.store import decode_store

BLOCK_BYTES, NUM_UNITS = 4096, 2
SPACE = b"n" * 32


def names(*numbers: int) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(b"%d" % number).digest() for number in numbers)


def content(number: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    return hashlib.shake_128(b"%d" % number).digest(block_bytes)


class Host:
    """One host's store. `wire` holds (from, to, message) in order."""

    def __init__(
        self,
        name: str = "host",
        *,
        slots: int = 16,
        life: int = 1,
        lower: LowerTier | None = None,
        links: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.wire: deque[tuple[str, str, Message]] = deque()
        self.arena = Arena(slots * BLOCK_BYTES)
        self.peers = Peers(links, self._send)
        checks = Checks(lambda job: job(), lambda: None)
        self.server = StoreServer(
            self.arena, f"{name}/{life}", lower or NoLowerTier(), self.peers, checks, self._send, NullJournal()
        )

    def _send(self, to: str, message: Message) -> bool:
        self.wire.append((self.name, to, message))
        return True


make_copies: Callable[[HostMemory], Any] = HostCopies
"""Of each worker; tests that run over several kinds put another here."""


class Worker:
    """One worker's session and pool. Checks that no load or put ends while a copy still uses its blocks."""

    def __init__(
        self, name: str, wire: deque[tuple[str, str, Message]], *, num_blocks: int = 16, space: bytes = SPACE
    ) -> None:
        self.name = name
        self.pool = HostMemory(num_blocks, BLOCK_BYTES, NUM_UNITS)
        self.events: list[StoreEvent] = []
        self.copies = make_copies(self.pool)
        self.session = StoreSession(
            space, self.copies, lambda message: wire.append((name, "host", message)), self._on_event
        )

    @property
    def copying(self) -> bool:
        """Whether copies are in flight that end when polled."""
        return self.session.poll_s < float("inf") and not getattr(self.copies, "held", False)

    def _on_event(self, event: StoreEvent) -> None:
        if isinstance(event, StoreLoaded | StoreWritten):
            operation = self.session._by_key.get(event.key) or self._writing(event.key)
            assert operation is None or not operation.copying
            touched = getattr(self.copies, "touched", set())
            assert operation is None or not touched & set(operation.blocks), "ended while a copy uses its blocks"
        self.events.append(event)

    def _writing(self, key: object) -> Any:
        return next((each for each in self.session._writings.values() if each.key == key), None)

    def fill(self, block: int, number: int) -> None:
        self.pool.block(block)[:] = content(number)

    def holds(self, block: int, number: int) -> bool:
        return bytes(self.pool.block(block)) == content(number)

    @property
    def puts_open(self) -> bool:
        return bool(self.session._writings)

    def events_of(self, kind: type[StoreEvent]) -> list[StoreEvent]:
        return [event for event in self.events if isinstance(event, kind)]


class World:
    """All hosts on one clock, `now`. Messages to and from the names in `lost` are dropped."""

    def __init__(self, *workers: str, host: Host | None = None) -> None:
        self.host = host or Host()
        self.now = 0.0
        self.lost: set[str] = set()
        self.workers: dict[str, Worker] = {}
        for name in workers:
            self.join(name)

    def join(self, name: str, space: bytes = SPACE, num_blocks: int = 16) -> Worker:
        worker = self.workers[name] = Worker(name, self.host.wire, space=space, num_blocks=num_blocks)
        self.run()
        return worker

    def run(self, seconds: float = 0.0) -> None:
        """Advance the clock in small steps, delivering all messages."""
        end = self.now + seconds
        while True:
            self.step()
            if self.now >= end:
                return
            self.now = min(end, self.now + 0.1)

    def step(self) -> None:
        for worker in self.workers.values():
            worker.session.tick(self.now)
        for _ in range(10_000):
            self.host.server.tick(self.now)
            self.deliver()
            for worker in self.workers.values():
                worker.session.work(lambda: self.now)
            if not self.host.wire and not any(worker.copying for worker in self.workers.values()):
                return
        raise AssertionError("the messages do not come to an end")

    def deliver(self, count: int = 10_000) -> None:
        """Deliver at most this many messages, each encoded and decoded."""
        wire = self.host.wire
        for _ in range(min(count, len(wire))):
            origin, to, message = wire.popleft()
            message = decode_store(encode(message))
            if origin in self.lost or to in self.lost:
                continue
            if to == "host":
                self.host.server.on_message(origin, message, self.now)
            elif to in self.workers:
                self.workers[to].session.on_message(message, self.now)

    # -- common actions of tests

    def put(self, name: str, *numbers: int) -> int:
        """Worker `name` fills its first blocks and puts them; returns how many the store accepted."""
        worker = self.workers[name]
        for block, number in enumerate(numbers):
            worker.fill(block, number)
        worker.session.put(b"put", names(*numbers), range(len(numbers)), self.now)
        self.run()
        done = worker.events_of(StoreWritten)[-1]
        assert isinstance(done, StoreWritten)
        return done.num_blocks

    def let_go(self, name: str) -> None:
        """End this worker's lookup, if any."""
        self.workers[name].session.stop(LegKey(name, 0), self.now)
        self.run()

    def find(self, name: str, *numbers: int, first: int = 0) -> tuple[int, ...]:
        self.let_go(name)
        self.workers[name].session.lookup(LegKey(name, 0), names(*numbers), first, self.now)
        self.run()
        found = self.workers[name].events_of(StoreFound)[-1]
        assert isinstance(found, StoreFound)
        return found.tiers

    def load(self, name: str, blocks: range) -> int:
        """Load after `find`; returns the number of loaded blocks."""
        self.workers[name].session.load(LegKey(name, 0), 0, blocks, self.now)
        self.run()
        loaded = self.workers[name].events_of(StoreLoaded)[-1]
        assert isinstance(loaded, StoreLoaded)
        return loaded.num_blocks


class InlineStore:
    """A `Store` (kvtransfer.store.client) without a thread: a worker of a World that runs each command at once.

    While it is `held`, commands wait; `release` runs them and puts their events into the worker's inbox.
    """

    def __init__(self, world: World, name: str, num_blocks: int, deliver: Callable[[StoreEvent], None]) -> None:
        self.world = world
        self.held = False
        self.worker = world.join(name, num_blocks=num_blocks)
        self._deliver = deliver
        self._todo: list[Callable[[StoreSession, float], None]] = []

    @property
    def attached(self) -> bool:
        return self.worker.session.attached

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int) -> None:
        self._do(lambda session, now: session.lookup(key, hashes, first, now))

    def load(self, key: LegKey, skip: int, blocks: Sequence[int]) -> None:
        self._do(lambda session, now: session.load(key, skip, blocks, now))

    def stop(self, key: LegKey) -> None:
        self._do(lambda session, now: session.stop(key, now))

    def put(self, key: bytes, hashes: Sequence[bytes], blocks: Sequence[int]) -> None:
        self._do(lambda session, now: session.put(key, hashes, blocks, now))

    def touch(self, hashes: Sequence[bytes]) -> None:
        self._do(lambda session, now: session.touch(hashes))

    @property
    def counters(self) -> StoreClientCounters:
        return self.worker.session.counters

    def close(self) -> None: ...

    def release(self) -> None:
        """Run all waiting commands before any of their events is delivered."""
        self.held = False
        todo, self._todo = self._todo, []
        for command in todo:
            command(self.worker.session, self.world.now)
        self.world.run()
        self._tell()

    def _do(self, command: Callable[[StoreSession, float], None]) -> None:
        self._todo.append(command)
        if not self.held:
            self.release()

    def _tell(self) -> None:
        events, self.worker.events[:] = [*self.worker.events], []
        for event in events:
            self._deliver(event)
