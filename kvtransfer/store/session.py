"""A worker's side of the store without thread and socket: attaching, lookups, loads into the pool, writing behind.

It is told what the worker's loop wants and what the store says; it copies between pool and arena in `work`, a bounded
piece at a time, and delivers events. Whatever the store does, every lookup ends in one StoreFound, every load in one
StoreLoaded and every put in one StoreWritten: while it is silent, gone or foreign they say that nothing was found.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtransfer.blocks.memory import SharedReader
from kvtransfer.exchange import LegKey
from kvtransfer.store.arena import Copies, map_arena
from kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from node.errors import PeerLost
from node.messages import Message
from node.store_messages import (
    RAM,
    Arrival,
    Attach,
    Attached,
    Beat,
    Commit,
    Damaged,
    Detached,
    Fetch,
    Fetched,
    Found,
    Granted,
    Lookup,
    Place,
    Put,
    Release,
    Touch,
    Written,
)
from node.telemetry import log_event

logger = logging.getLogger("store_client")

BEAT_S = 0.5
DOWN_AFTER_S = 2.0
"""A store that was silent for so long is taken for gone, until it answers Attach."""
REFUSED_S = 10.0
"""Until the next try after a refusal."""
GIVE_UP_S = 10.0
"""A lookup, load or put that has not ended by then ends with what it has."""
FETCH_WINDOW = 64
"""Blocks on their way from disk or peers for one load."""
WORK_BYTES = 8 << 20
"""Copied in one call of `work`, so that messages are not kept waiting."""


@dataclass(slots=True)
class SessionCounters:
    """Only ever grow."""

    lookups: int = 0
    lookups_lost: int = 0
    """Answered with nothing because there was no store to ask."""
    loaded_bytes: int = 0
    written_bytes: int = 0
    damaged_blocks: int = 0
    failed_blocks: int = 0
    """Found, and then not to be had."""
    times_lost: int = 0
    """The store went away."""


@dataclass(slots=True, eq=False)
class _Reading:
    """A lookup, and the load that may follow it."""

    key: LegKey
    id: int
    hashes: tuple[bytes, ...]
    first: int
    deadline: float
    places: tuple[Place, ...] = ()
    blocks: tuple[int, ...] | None = None
    """Pool blocks to load into; None before `load`."""
    begun_at: float = 0.0
    copy_s: float = 0.0
    limit: int = 0
    """Blocks that can still be had: one that cannot ends the run before it."""
    copied: set[int] = field(default_factory=set)
    done: int = 0
    """Blocks copied without a gap, from the first on."""
    to_fetch: deque[int] = field(default_factory=deque)
    fetching: int = 0


@dataclass(slots=True, eq=False)
class _Writing:
    key: bytes
    id: int
    blocks: tuple[int, ...]
    deadline: float
    left: int = -1
    """Blocks to copy; -1 before the store has granted slots."""
    written: list[Written] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Copy:
    """One block between the arena at `offset` and the pool; `number` is its place in the operation."""

    operation: _Reading | _Writing
    number: int
    block: int
    offset: int
    digest: bytes = b""


class StoreSession:
    """`send` says a message to the store, `deliver` tells the worker's loop."""

    def __init__(
        self,
        namespace: bytes,
        copies: Copies,
        send: Callable[[Message], object],
        deliver: Callable[[StoreEvent], None],
        mapped: Callable[[Attached], SharedReader] = map_arena,
    ) -> None:
        self.counters = SessionCounters()
        self._attach = Attach(namespace=namespace, block_bytes=copies.block_bytes, digest=copies.digest)
        self._copies = copies
        self._send = send
        self._deliver = deliver
        self._mapped = mapped
        self._arena: SharedReader | None = None
        self._store: Attached | None = None
        self._heard_at = 0.0
        self._next_at = 0.0
        self._numbers = 0
        self._readings: dict[int, _Reading] = {}
        self._by_key: dict[LegKey, _Reading] = {}
        self._writings: dict[int, _Writing] = {}
        self._reads: deque[_Copy] = deque()
        self._writes: deque[_Copy] = deque()

    @property
    def attached(self) -> bool:
        return self._arena is not None

    @property
    def store(self) -> str:
        """The identity of the store that is attached, "" while there is none."""
        return self._store.store if self._store is not None else ""

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do."""
        return bool(self._reads or self._writes)

    # ---- told by the worker's loop

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int, now: float) -> None:
        """Ask for blocks [first, ...) of a chain; StoreFound follows. End it with `load` or `stop`."""
        self.counters.lookups += 1
        if self._arena is None or key in self._by_key:
            self.counters.lookups_lost += 1
            self._deliver(StoreFound(key, ()))
            return
        reading = _Reading(key, self._number(), tuple(hashes), first, now + GIVE_UP_S)
        self._readings[reading.id] = self._by_key[key] = reading
        self._send(Lookup(id=reading.id, first=first, hashes=reading.hashes))

    def load(self, key: LegKey, skip: int, blocks: Sequence[int], now: float) -> None:
        """Copy what was found, but for the first `skip` blocks, into these blocks of the pool; StoreLoaded follows."""
        reading = self._by_key.get(key)
        if reading is None:
            self._deliver(StoreLoaded(key, 0, (), 0.0, 0.0))
            return
        reading.blocks = tuple(blocks)
        reading.places = reading.places[skip:]
        reading.first += skip
        reading.limit = min(len(blocks), len(reading.places))
        reading.begun_at, reading.deadline = now, now + GIVE_UP_S
        for number, place in enumerate(reading.places[: reading.limit]):
            if place.tier == RAM:
                self._reads.append(_Copy(reading, number, blocks[number], place.offset, place.digest))
            else:
                reading.to_fetch.append(number)
        self._fetch(reading)
        self._end_if_loaded(reading, now)

    def stop(self, key: LegKey, now: float) -> None:
        """End a lookup, or a load with what it has loaded so far."""
        if (reading := self._by_key.get(key)) is not None:
            self._end_reading(reading, now)

    def put(self, key: bytes, hashes: Sequence[bytes], blocks: Sequence[int], now: float) -> None:
        """Offer these blocks of the pool, which must not change before StoreWritten."""
        if self._arena is None:
            self._deliver(StoreWritten(key, 0))
            return
        writing = _Writing(key, self._number(), tuple(blocks), now + GIVE_UP_S)
        self._writings[writing.id] = writing
        self._send(Put(id=writing.id, hashes=tuple(hashes)))

    def touch(self, hashes: Sequence[bytes]) -> None:
        """A chain has been used to its end."""
        if self._arena is not None:
            self._send(Touch(hashes=tuple(hashes)))

    # ---- told by the store

    def on_message(self, message: Message, now: float) -> None:
        self._heard_at = now
        match message:
            case Attached():
                self._on_attached(message, now)
            case Detached():
                self._lose(f"detached: {message.reason}", now)
                self._next_at = now + REFUSED_S if message.final else now
            case Found():
                self._on_found(message)
            case Fetched():
                if (reading := self._readings.get(message.id)) is not None and reading.blocks is not None:
                    for arrival in message.arrivals:
                        self._on_arrival(reading, reading.blocks, arrival)
                    self._fetch(reading)
                    self._end_if_loaded(reading, now)
            case Granted():
                self._on_granted(message)

    def tick(self, now: float) -> float:
        """Beat, attach, give up what waits too long; returns when to call again."""
        if self._arena is not None and now - self._heard_at > DOWN_AFTER_S:
            self._lose("silent", now)
        if now >= self._next_at:
            self._next_at = now + BEAT_S
            self._send(Beat() if self._arena is not None else self._attach)
        for reading in [each for each in self._readings.values() if now >= each.deadline]:
            self._end_reading(reading, now)
        for writing in [each for each in self._writings.values() if now >= each.deadline]:
            self._end_writing(writing)
        return self._next_at

    def work(self, clock: Callable[[], float]) -> None:
        """Copy up to WORK_BYTES: loads first, since a prompt waits for them."""
        done = 0
        while done < WORK_BYTES and self.busy:
            copy = self._reads.popleft() if self._reads else self._writes.popleft()
            begun = clock()
            if isinstance(copy.operation, _Writing):
                self._write(copy.operation, copy)
            elif copy.operation.id in self._readings and copy.number < copy.operation.limit:
                self._read(copy.operation, copy)
                copy.operation.copy_s += clock() - begun
                self._end_if_loaded(copy.operation, clock())
            done += self._copies.block_bytes

    def close(self) -> None:
        """Let go of the arena; nothing is told any more."""
        self._readings.clear()
        self._by_key.clear()
        self._writings.clear()
        self._unmap()

    # -- attaching

    def _on_attached(self, message: Attached, now: float) -> None:
        if self._store is not None and self._store == message:
            return
        if self._arena is not None:
            self._lose("another life of the store", now)
        try:
            self._arena = self._mapped(message)
        except PeerLost as error:
            self._next_at = now + REFUSED_S
            log_event(logger, "store_unusable", level=logging.WARNING, reason=str(error))
            return
        self._store, self._next_at = message, now + min(BEAT_S, message.lease_s / 4)
        log_event(logger, "store_attached", size_mib=round(message.size_bytes / (1 << 20), 1))

    def _lose(self, reason: str, now: float) -> None:
        """The store holds nothing for us any more: all that waits for it ends."""
        if self._arena is not None:
            self.counters.times_lost += 1
            log_event(logger, "store_lost", level=logging.WARNING, reason=reason)
        for reading in [*self._readings.values()]:
            self._end_reading(reading, now)
        for writing in [*self._writings.values()]:
            self._end_writing(writing)
        self._unmap()
        self._next_at = now

    def _unmap(self) -> None:
        self._reads.clear()
        self._writes.clear()
        arena, self._arena, self._store = self._arena, None, None
        if arena is not None:
            arena.close()

    # -- reading

    def _on_found(self, message: Found) -> None:
        reading = self._readings.get(message.id)
        if reading is None or reading.places or reading.blocks is not None:
            if reading is None:
                self._send(Release(id=message.id))  # it came too late
            return
        reading.places = message.places[: len(reading.hashes) - reading.first]
        reading.deadline = float("inf")  # it is held until the worker's loop says `load` or `stop`
        self._deliver(StoreFound(reading.key, tuple(place.tier for place in reading.places)))
        if not reading.places:
            self._forget(reading)

    def _fetch(self, reading: _Reading) -> None:
        indices = []
        while reading.to_fetch and reading.fetching < FETCH_WINDOW:
            number = reading.to_fetch.popleft()
            if number < reading.limit:
                indices.append(reading.first + number)
                reading.fetching += 1
        if indices:
            self._send(Fetch(id=reading.id, indices=tuple(indices)))

    def _on_arrival(self, reading: _Reading, blocks: tuple[int, ...], arrival: Arrival) -> None:
        number = arrival.index - reading.first
        reading.fetching -= 1
        if not 0 <= number < reading.limit:
            return
        if arrival.digest:
            self._reads.append(_Copy(reading, number, blocks[number], arrival.offset, arrival.digest))
        else:
            self.counters.failed_blocks += 1
            reading.limit = number

    def _read(self, reading: _Reading, copy: _Copy) -> None:
        assert self._arena is not None, "a copy without an arena"
        size = self._copies.block_bytes
        try:
            ok = self._copies.load(copy.block, self._arena.span(copy.offset, size)) == copy.digest
        except PeerLost:  # a place outside of the arena
            ok = False
        if ok:
            reading.copied.add(copy.number)
            self.counters.loaded_bytes += size
            return
        self.counters.damaged_blocks += 1
        self._send(Damaged(hash=reading.hashes[reading.first + copy.number]))
        reading.limit = copy.number

    def _end_if_loaded(self, reading: _Reading, now: float) -> None:
        while reading.done in reading.copied:
            reading.done += 1
        if reading.blocks is not None and reading.done >= reading.limit:
            self._end_reading(reading, now)

    def _end_reading(self, reading: _Reading, now: float) -> None:
        if reading.blocks is None:
            if not reading.places:
                self._deliver(StoreFound(reading.key, ()))
        else:
            count = min(reading.done, reading.limit)
            tiers = tuple(place.tier for place in reading.places[:count])
            self._deliver(StoreLoaded(reading.key, count, tiers, now - reading.begun_at, reading.copy_s))
        self._forget(reading)

    def _forget(self, reading: _Reading) -> None:
        del self._readings[reading.id], self._by_key[reading.key]
        self._send(Release(id=reading.id))

    # -- writing

    def _on_granted(self, message: Granted) -> None:
        writing = self._writings.get(message.id)
        if writing is None or writing.left >= 0:
            if writing is None:
                self._send(Release(id=message.id))
            return
        slots = [slot for slot in message.slots if slot.index < len(writing.blocks)]
        writing.left = len(slots)
        self._writes += [_Copy(writing, slot.index, writing.blocks[slot.index], slot.offset) for slot in slots]
        if not slots:
            self._end_writing(writing)

    def _write(self, writing: _Writing, copy: _Copy) -> None:
        assert self._arena is not None, "a copy without an arena"
        if writing.id not in self._writings:
            return
        try:
            digest = self._copies.save(copy.block, self._arena.span(copy.offset, self._copies.block_bytes))
        except PeerLost:
            self._end_writing(writing)
            return
        writing.written.append(Written(copy.number, digest))
        writing.left -= 1
        self.counters.written_bytes += self._copies.block_bytes
        if not writing.left:
            self._end_writing(writing)

    def _end_writing(self, writing: _Writing) -> None:
        """Commit what is written; the store takes the other slots back."""
        del self._writings[writing.id]
        self._send(Commit(id=writing.id, written=tuple(writing.written)))
        self._deliver(StoreWritten(writing.key, len(writing.written)))

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
