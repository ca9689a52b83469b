"""One simulated worker's client of its host's store: the loop's calls, and the events that answer them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.node.counters import StoreClientCounters
from baton.node.leg import LegKey
from baton.simulator.store import HostStore, Reading


class SimStore:
    """Replaces kvtransfer.store.client.StoreClient in a worker's loop. `clock` is the loop's, which is ahead of the
    world's after a step; calls made then take effect when the step has ended."""

    attached = True

    def __init__(
        self, store: HostStore, owner: str, clock: Callable[[], float], deliver: Callable[[StoreEvent], None]
    ) -> None:
        self._store = store
        self._world = store.world
        self._owner = owner
        self._clock = clock
        self._deliver = deliver
        self._asked: dict[LegKey, int] = {}  # lookups without an answer, by their number
        self._readings: dict[LegKey, Reading] = {}
        self.counters = StoreClientCounters()
        self._closed = False

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int) -> None:
        self._do(self._ask, key, tuple(hashes), first)

    def load(self, key: LegKey, skip: int, blocks: Sequence[int]) -> None:
        self._do(self._load, key, skip, len(blocks))

    def stop(self, key: LegKey) -> None:
        self._do(self._stop, key)

    def put(self, key: bytes, hashes: Sequence[bytes], blocks: Sequence[int]) -> None:
        self._do(self._offer, key, tuple(hashes))

    def touch(self, hashes: Sequence[bytes]) -> None:
        self._do(self._store.touch, tuple(hashes))

    def close(self) -> None:
        """The worker is gone: no more calls or events."""
        self._closed = True
        self._store.forget(self._owner)
        for reading in self._readings.values():
            reading.over = True

    # -- at the time of the event

    def _do(self, call: Callable[..., None], *arguments: object) -> None:
        self._world.at(self._clock(), self._unless_closed, call, *arguments)

    def _unless_closed(self, call: Callable[..., None], *arguments: object) -> None:
        if not self._closed:
            call(*arguments)

    def _after_answer(self, call: Callable[..., None], *arguments: object) -> None:
        self._world.later(self._store.costs.answer_s, self._unless_closed, call, *arguments)

    def _ask(self, key: LegKey, hashes: Sequence[bytes], first: int) -> None:
        self.counters.store_lookups += 1
        self._asked[key] = number = self.counters.store_lookups
        self._after_answer(self._look, key, number, hashes, first)

    def _look(self, key: LegKey, number: int, hashes: Sequence[bytes], first: int) -> None:
        if self._asked.get(key) != number:
            return  # its leg has ended
        del self._asked[key]
        reading = self._store.look(self._owner, hashes, first)
        if reading.tiers:
            self._readings[key] = reading
        else:
            self._store.end(reading)
        self._deliver(StoreFound(key, tuple(reading.tiers)))

    def _load(self, key: LegKey, skip: int, num_blocks: int) -> None:
        if (reading := self._readings.get(key)) is None:
            self._deliver(StoreLoaded(key, 0, (), 0.0, 0.0))
        else:
            self._store.load(reading, skip, num_blocks, lambda: self._end(key))

    def _stop(self, key: LegKey) -> None:
        self._asked.pop(key, None)
        if key in self._readings:
            self._end(key)

    def _end(self, key: LegKey) -> None:
        """A load ends with what is in the pool; without one there is no event."""
        reading = self._readings.pop(key)
        self._store.end(reading)
        if reading.on_end is not None:
            self.counters.store_loaded_bytes += reading.done * self._store.block_bytes
            load_s = self._world.now - reading.begun_at
            tiers = tuple(reading.tiers[: reading.done])
            self._deliver(StoreLoaded(key, reading.done, tiers, load_s, min(reading.copy_s, load_s)))

    def _offer(self, key: bytes, hashes: Sequence[bytes]) -> None:
        self._after_answer(
            self._store.put, self._owner, hashes, lambda num_blocks: self._unless_closed(self._wrote, key, num_blocks)
        )

    def _wrote(self, key: bytes, num_blocks: int) -> None:
        self.counters.store_written_bytes += num_blocks * self._store.block_bytes
        self._deliver(StoreWritten(key, num_blocks))
