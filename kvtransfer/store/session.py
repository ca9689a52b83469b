"""A worker's side of the store without thread and socket: attaching, lookups, loads into the pool, writing behind.

It is called with commands of the worker's loop and messages of the store; in `work` it begins copies between pool and
arena and takes in those that have ended, and it delivers events. Whatever the store does, every lookup ends in one
StoreFound, every load in one StoreLoaded and every put in one StoreWritten: while it is silent, gone or foreign they
say that nothing was found. A load or put ends when no copy touches its blocks any more, however it ends, and memory of
a store that is lost is let go when no copy uses it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.kvtransfer.blocks.copies import Copies, Pair
from baton.kvtransfer.blocks.memory import SharedReader
from baton.kvtransfer.store.arena import map_arena
from baton.kvtransfer.store.copy_queue import Copied, Copy, CopyQueue
from baton.kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.kvtransfer.store.mapped_arena import MappedArena
from baton.node.counters import StoreClientCounters
from baton.node.errors import PeerLost
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.messages.store import (
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
from baton.node.telemetry import log_event

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
UNUSABLE_S = 120.0
"""Until the next try where the arena cannot be made fit for copies: trying costs seconds, and memory."""


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
    fetching: set[int] = field(default_factory=set)
    """Asked for, and not arrived."""
    copying: int = 0
    ending: bool = False
    """Nothing more is wanted of it; it is over with the copies that are under way."""

    def wants(self, number: int) -> bool:
        return not self.ending and number < self.limit


@dataclass(slots=True, eq=False)
class _Writing:
    key: bytes
    id: int
    blocks: tuple[int, ...]
    deadline: float
    left: int = -1
    """Blocks to copy; -1 before the store has granted slots."""
    written: list[Written] = field(default_factory=list)
    copying: int = 0
    ending: bool = False

    def wants(self, number: int) -> bool:
        return not self.ending


class StoreSession:
    """One worker's session with the store: `send` goes to the store, `deliver` to the worker's loop."""

    def __init__(
        self,
        namespace: bytes,
        copies: Copies,
        send: Callable[[Message], object],
        deliver: Callable[[StoreEvent], None],
        mapped: Callable[[Attached], SharedReader] = map_arena,
    ) -> None:
        self.counters = StoreClientCounters()
        self._attach = Attach(
            namespace=namespace, block_bytes=copies.block_bytes, num_units=copies.num_units, digest=copies.digest
        )
        self._copies = copies
        self._queue: CopyQueue[_Reading | _Writing] = CopyQueue(copies)
        self._send = send
        self._deliver = deliver
        self._arena = MappedArena(copies, mapped)
        self._last_message_at = 0.0
        self._next_at = 0.0
        self._numbers = 0
        self._readings: dict[int, _Reading] = {}
        self._by_key: dict[LegKey, _Reading] = {}
        self._writings: dict[int, _Writing] = {}

    @property
    def attached(self) -> bool:
        return self._arena.ready

    @property
    def store(self) -> str:
        """The identity of the store that is attached, "" while there is none."""
        return self._arena.store.store if self._arena.store is not None and self._arena.ready else ""

    @property
    def poll_s(self) -> float:
        """How long `work` may be left alone, at most."""
        return self._queue.poll_s

    # ---- called by the worker's loop

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int, now: float) -> None:
        """Ask for blocks [first, ...) of a chain; StoreFound follows. End it with `load` or `stop`."""
        self.counters.store_lookups += 1
        if not self.attached or key in self._by_key:
            self.counters.store_lookups_lost += 1
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
                self._queue_load(reading, number, place.offset, place.digest)
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
        if not self.attached:
            self._deliver(StoreWritten(key, 0))
            return
        writing = _Writing(key, self._number(), tuple(blocks), now + GIVE_UP_S)
        self._writings[writing.id] = writing
        self._send(Put(id=writing.id, hashes=tuple(hashes)))

    def touch(self, hashes: Sequence[bytes]) -> None:
        """A chain has been used to its end."""
        if self.attached:
            self._send(Touch(hashes=tuple(hashes)))

    # ---- called for messages

    def on_message(self, message: Message, now: float) -> None:
        self._last_message_at = now
        match message:
            case Attached():
                self._on_attached(message, now)
            case Detached():
                self._lose(f"detached: {message.reason}", now)
                self._next_at = now + REFUSED_S if message.final else now
            case Found():
                self._on_found(message)
            case Fetched():
                reading = self._readings.get(message.id)
                if reading is not None and reading.blocks is not None and not reading.ending:
                    for arrival in message.arrivals:
                        self._on_arrival(reading, arrival)
                    self._fetch(reading)
                    self._end_if_loaded(reading, now)
            case Granted():
                self._on_granted(message)

    def tick(self, now: float) -> float:
        """Beat, attach, give up what waits too long; returns when to call again."""
        if self._arena.store is not None and now - self._last_message_at > DOWN_AFTER_S:
            self._lose("silent", now)
        if now >= self._next_at:
            self._next_at = now + BEAT_S
            self._send(Beat() if self._arena.store is not None else self._attach)
        self._look_at_lock(now)
        for reading in [each for each in self._readings.values() if now >= each.deadline]:
            self._end_reading(reading, now)
        for writing in [each for each in self._writings.values() if now >= each.deadline]:
            self._end_writing(writing)
        return self._next_at

    def work(self, clock: Callable[[], float]) -> None:
        """Begin copies, and take in those that have ended."""
        self._queue.begin(clock)
        for done in self._queue.take(clock):
            if isinstance(done.copy.operation, _Writing):
                self._on_saved(done.copy.operation, done)
            else:
                self._on_copied(done.copy.operation, done, clock())
        if self._arena.is_leaving and self._queue.idle:
            self._arena.let_go()

    def close(self) -> None:
        """Wait for the copies under way, and let go of the arena; nothing is delivered any more."""
        self._readings.clear()
        self._by_key.clear()
        self._writings.clear()
        self._queue.close()
        self._arena.close()

    # -- attaching

    def _on_attached(self, message: Attached, now: float) -> None:
        if self._arena.store is not None:
            if self._arena.store == message:
                return
            self._lose("another life of the store", now)
        if self._arena.is_leaving:
            return  # asked again until its memory is free
        try:
            self._arena.map(message)
        except PeerLost as error:
            self._refuse(error, now + REFUSED_S)
            return
        self._next_at = now + min(BEAT_S, message.lease_s / 4)
        self._look_at_lock(now)

    def _look_at_lock(self, now: float) -> None:
        """The arena counts from when copies may use it; until then the store gets beats."""
        try:
            became_ready = self._arena.became_ready()
        except PeerLost as error:
            self._unmap()
            self._refuse(error, now + UNUSABLE_S)
            return
        if became_ready and self._arena.store is not None:
            log_event(logger, "store_attached", size_mib=round(self._arena.store.size_bytes / (1 << 20), 1))

    def _refuse(self, error: PeerLost, until: float) -> None:
        self._next_at = until
        log_event(logger, "store_unusable", level=logging.WARNING, reason=str(error))

    def _lose(self, reason: str, now: float) -> None:
        """The store holds nothing for us any more: all that waits for it ends."""
        if self._arena.store is not None:
            self.counters.store_disconnects += 1
            log_event(logger, "store_lost", level=logging.WARNING, reason=reason)
        for reading in [*self._readings.values()]:
            self._end_reading(reading, now)
        for writing in [*self._writings.values()]:
            self._end_writing(writing)
        self._unmap()
        self._next_at = now

    def _unmap(self) -> None:
        """Now, or when no copy uses it any more."""
        self._queue.drop_waiting()
        self._arena.unmap(in_use=not self._queue.idle)

    # -- reading

    def _on_found(self, message: Found) -> None:
        reading = self._readings.get(message.id)
        if reading is None or reading.places or reading.blocks is not None:
            if reading is None:
                self._send(Release(id=message.id))  # it came too late
            return
        reading.places = message.places[: len(reading.hashes) - reading.first]
        reading.deadline = float("inf")  # it is held until the worker's loop calls `load` or `stop`
        self._deliver(StoreFound(reading.key, tuple(place.tier for place in reading.places)))
        if not reading.places:
            self._forget(reading)

    def _fetch(self, reading: _Reading) -> None:
        indices = []
        while reading.to_fetch and len(reading.fetching) < FETCH_WINDOW:
            number = reading.to_fetch.popleft()
            if number < reading.limit:
                indices.append(reading.first + number)
                reading.fetching.add(number)
        if indices:
            self._send(Fetch(id=reading.id, indices=tuple(indices)))

    def _on_arrival(self, reading: _Reading, arrival: Arrival) -> None:
        number = arrival.index - reading.first
        if number not in reading.fetching:
            return  # not asked for, or a second time
        reading.fetching.remove(number)
        if number >= reading.limit:
            return
        if arrival.digest:
            self._queue_load(reading, number, arrival.offset, arrival.digest)
        else:
            self.counters.store_failed_blocks += 1
            reading.limit = number

    def _queue_load(self, reading: _Reading, number: int, offset: int, digest: bytes) -> None:
        assert reading.blocks is not None, "a load without blocks"
        try:
            span = self._arena.span(offset)
        except PeerLost:
            self._on_damaged(reading, number)
        else:
            self._queue.load(Copy(reading, number, Pair(reading.blocks[number], span), digest))

    def _on_copied(self, reading: _Reading, done: Copied[_Reading | _Writing], now: float) -> None:
        reading.copy_s += done.took_s
        if done.digest == done.copy.digest:
            reading.copied.add(done.copy.number)
            self.counters.store_loaded_bytes += self._copies.block_bytes
        else:
            self._on_damaged(reading, done.copy.number)
        self._end_if_loaded(reading, now)

    def _on_damaged(self, reading: _Reading, number: int) -> None:
        self.counters.store_damaged_blocks += 1
        self._send(Damaged(hash=reading.hashes[reading.first + number]))
        reading.limit = min(reading.limit, number)

    def _end_if_loaded(self, reading: _Reading, now: float) -> None:
        while reading.done in reading.copied:
            reading.done += 1
        if reading.ending or (reading.blocks is not None and reading.done >= reading.limit):
            self._end_reading(reading, now)

    def _end_reading(self, reading: _Reading, now: float) -> None:
        """Now, or with the last of its copies that are under way."""
        reading.ending, reading.deadline = True, float("inf")
        if reading.copying:
            return
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
        try:
            spans = [self._arena.span(slot.offset) for slot in slots]
        except PeerLost:
            slots, spans = [], []
        writing.left = len(slots)
        for slot, span in zip(slots, spans, strict=True):
            self._queue.save(Copy(writing, slot.index, Pair(writing.blocks[slot.index], span)))
        if not slots:
            self._end_writing(writing)

    def _on_saved(self, writing: _Writing, done: Copied[_Reading | _Writing]) -> None:
        writing.written.append(Written(done.copy.number, done.digest))
        writing.left -= 1
        self.counters.store_written_bytes += self._copies.block_bytes
        if writing.ending or not writing.left:
            self._end_writing(writing)

    def _end_writing(self, writing: _Writing) -> None:
        """Commit what is written, when no copy is under way; the store takes the other slots back."""
        writing.ending, writing.deadline = True, float("inf")
        if writing.copying:
            return
        self._send(Commit(id=writing.id, written=tuple(writing.written)))
        self._deliver(StoreWritten(writing.key, len(writing.written)))
        del self._writings[writing.id]

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
