"""A host's KV store on simulated time: the tier of each block, and the time of moving it.

Real: each tier's index (LRU, holders, quota), admission to disk at the second use, KV events to the proxy, and all
decisions of the worker (worker.prefix_loading and its gate). Simulated: the movements between RAM and GPUs and to and
from the disk, each tier with one queue a host in which blocks wait in order. Lookups are answered after a fixed time.
Other hosts' stores are not used; no bytes are copied, so that none is ever damaged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.kvtransfer.blocks.events import FLUSH_EVERY_S, BlockJournal
from baton.kvtransfer.store.arena_index import ArenaIndex, Holder, Key
from baton.kvtransfer.store.disk.second_use import FIRST_USE_PART, SecondUse
from baton.kvtransfer.store.disk_thread import MAX_REMEMBERED
from baton.kvtransfer.store.loads import LOADER, MAX_LOADS
from baton.kvtransfer.store.process import HELD_FOR_DISK
from baton.kvtransfer.store.publisher import EventPublisher
from baton.kvtransfer.store.server import SELF
from baton.kvtransfer.store.session import FETCH_WINDOW
from baton.node.endpoint import identity_of
from baton.node.messages.store import DISK, RAM
from baton.simulator.latency import Profile
from baton.simulator.network import Network, SimLine

NAMESPACE = b"simulated"
DIGEST = b"\0" * 16
"""Content is not simulated."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Sizes of each host's store. A disk of 0 bytes is no disk."""

    ram_bytes: int
    disk_bytes: int = 0
    first_use_part: float = FIRST_USE_PART
    """Of the disk that may be in use for a block to be written at its first use."""


class Link:
    """A queue with a bandwidth: movements follow one another."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def take(self, now: float, size_bytes: int, bytes_s: float) -> float:
        """Queue a movement; returns its end time."""
        self._free_at = max(now, self._free_at) + size_bytes / bytes_s
        return self._free_at


@dataclass(slots=True, eq=False)
class Reading:
    """A lookup and the load that may follow it; `names` and `tiers` are those of the found blocks."""

    holder: Holder
    names: list[Key]
    tiers: list[int]
    on_end: Callable[[], None] | None = None
    """Called when the load has ended by itself; none before it begins."""
    begun_at: float = 0.0
    copy_s: float = 0.0
    copied_at: float = 0.0
    """When the last copy of it that is queued will have ended."""
    ready_at: list[float] = field(default_factory=list)
    """Of each block, when it is in the pool; infinite before its copy is queued."""
    done: int = 0
    """Blocks in the pool without a gap, from the first on."""
    limit: int = 0
    """Blocks that can still be had."""
    to_fetch: deque[int] = field(default_factory=deque)
    fetching: int = 0
    over: bool = False


class HostStore:
    """The tiers of one host. Workers call it through SimStore at the simulated time of the call."""

    def __init__(self, network: Network, name: str, proxy: str, profile: Profile, capacity: Capacity) -> None:
        """Raises SettingsError for a tier that is smaller than a block."""
        line = SimLine(network, identity_of(name, 1), lambda: None)  # input is read at the next turn
        line.connect(proxy, "")
        self.identity = line.identity
        self.world = network.world
        self.block_bytes = profile.kv_layout().block_bytes
        self.costs = profile.store
        self._news = EventPublisher(line, name, 1, (proxy,), self.world.now)
        self.ram = self._index(capacity.ram_bytes, self._news.ram)
        self.disk = self._index(capacity.disk_bytes, self._news.disk) if capacity.disk_bytes else None
        self._gpu_link, self._disk_link = Link(), Link()
        self._second_use = SecondUse(MAX_REMEMBERED)
        self._first_use_bytes = int(capacity.first_use_part * capacity.disk_bytes)
        self._coming: dict[Key, list[tuple[Reading, int]]] = {}  # blocks being read from disk, and the waiting readings
        self._saving: set[Key] = set()
        self._max_saving = capacity.ram_bytes // HELD_FOR_DISK // self.block_bytes
        self._numbers = 0
        self._turn()

    def check(self) -> None:
        """Check the accounts of both tiers."""
        for index in (self.ram, self.disk):
            if index is not None:
                index.check()

    # -- called by workers

    def look(self, owner: str, hashes: Sequence[bytes], first: int) -> Reading:
        """The longest run of blocks from number `first` on; blocks in RAM are held until `end`."""
        names = [Key(NAMESPACE, each) for each in hashes]
        reading = Reading(self._holder(owner), names[first:], [])
        self.ram.touch(names)
        self._use(names)
        for name in reading.names:
            if self.ram.acquire(name, reading.holder) is not None:
                reading.tiers.append(RAM)
            elif self.disk is not None and self.disk.find(name) is not None:
                reading.tiers.append(DISK)
            else:
                break
        return reading

    def load(self, reading: Reading, skip: int, num_blocks: int, on_end: Callable[[], None]) -> None:
        """Move this many of the found blocks, behind the first `skip`, to the GPU."""
        reading.names, reading.tiers = reading.names[skip:], reading.tiers[skip:]
        reading.limit = min(num_blocks, len(reading.tiers))
        reading.begun_at, reading.on_end = self.world.now, on_end
        reading.ready_at = [float("inf")] * reading.limit
        for number in range(reading.limit):
            if reading.tiers[number] == RAM:
                self._copy(reading, number)
            else:
                reading.to_fetch.append(number)
        self._fetch(reading)
        self._look_at(reading)

    def end(self, reading: Reading) -> None:
        """End a reading. Queued movements are still completed."""
        reading.over = True
        self.ram.release(reading.holder)

    def put(self, owner: str, hashes: Sequence[bytes], on_end: Callable[[int], None]) -> None:
        """Store the blocks that are missing, as far as there is room; `on_end` gets their number."""
        holder, names = self._holder(owner), [Key(NAMESPACE, each) for each in hashes]
        granted = [name for name in names if self.ram.reserve(name, holder) is not None]
        self._use(names)
        end = self._gpu_link.take(self.world.now, len(granted) * self.block_bytes, self.costs.gpu_bytes_s)
        self.world.at(end, self._written, holder, granted, on_end)

    def touch(self, hashes: Sequence[bytes]) -> None:
        self.ram.touch([Key(NAMESPACE, each) for each in hashes])

    def forget(self, owner: str) -> None:
        """A worker has died: unfinished puts are lost, finished ones stay."""
        self.ram.release_owner(owner)

    # -- movements

    def _copy(self, reading: Reading, number: int) -> None:
        end = self._gpu_link.take(self.world.now, self.block_bytes, self.costs.gpu_bytes_s)
        reading.copy_s += end - max(self.world.now, reading.copied_at)
        reading.copied_at = reading.ready_at[number] = end
        self.world.at(end, self._look_at, reading)

    def _fetch(self, reading: Reading) -> None:
        """Read its next blocks from the disk; one that is not available ends the run before it."""
        while reading.to_fetch and reading.fetching < FETCH_WINDOW and not reading.over:
            number = reading.to_fetch.popleft()
            name = reading.names[number]
            if self.ram.acquire(name, reading.holder) is not None:
                self._copy(reading, number)
            elif name in self._coming or self._read(name):
                self._coming[name].append((reading, number))
                reading.fetching += 1
            else:
                reading.limit = number
                reading.to_fetch.clear()
                self._look_at(reading)

    def _read(self, name: Key) -> bool:
        holder = self._holder(LOADER)
        if self.disk is None or len(self._coming) >= MAX_LOADS or self.disk.acquire(name, holder) is None:
            return False
        if self.ram.reserve(name, holder) is None:
            self.disk.release(holder)
            return False
        self.disk.touch([name])
        self._coming[name] = []
        end = self._disk_link.take(self.world.now, self.block_bytes, self.costs.disk_read_bytes_s)
        self.world.at(end, self._arrived, self.disk, name, holder)
        return True

    def _arrived(self, disk: ArenaIndex, name: Key, holder: Holder) -> None:
        self.ram.commit(name, holder, DIGEST)
        self.ram.release(holder)
        disk.release(holder)
        waiting = [(reading, number) for reading, number in self._coming.pop(name) if not reading.over]
        for reading, number in waiting:  # all readings hold it before its room can be reused
            self.ram.acquire(name, reading.holder)
            self._copy(reading, number)
        for reading, _ in waiting:
            reading.fetching -= 1
            self._fetch(reading)

    def _look_at(self, reading: Reading) -> None:
        """Count the blocks that are in the pool, and end the load if it is complete."""
        while reading.done < reading.limit and reading.ready_at[reading.done] <= self.world.now:
            reading.done += 1
        if reading.on_end is not None and reading.done >= reading.limit and not reading.over:
            reading.on_end()

    def _written(self, holder: Holder, granted: Sequence[Key], on_end: Callable[[int], None]) -> None:
        came = [name for name in granted if self.ram.commit(name, holder, DIGEST)]
        self.ram.release(holder)
        self._use(came)
        on_end(len(came))

    def _use(self, names: Sequence[Key]) -> None:
        """Those of them that are in RAM are used: the second time, or while there is room the first, they are written
        to the disk, held meanwhile."""
        if (disk := self.disk) is None:
            return
        for name in names:
            if self.ram.find(name) is None or name in self._saving or disk.find(name) is not None:
                continue
            roomy = disk.occupancy.used_bytes < self._first_use_bytes
            if (self._second_use.use(name.hash) or roomy) and len(self._saving) < self._max_saving:
                self._second_use.forget(name.hash)
                self._save(disk, name)

    def _save(self, disk: ArenaIndex, name: Key) -> None:
        holder = self._holder(SELF)
        if disk.reserve(name, holder) is not None:
            self.ram.acquire(name, holder)
            self._saving.add(name)
            end = self._disk_link.take(self.world.now, self.block_bytes, self.costs.disk_write_bytes_s)
            self.world.at(end, self._saved, disk, name, holder)

    def _saved(self, disk: ArenaIndex, name: Key, holder: Holder) -> None:
        disk.commit(name, holder, DIGEST)
        disk.release(holder)
        self.ram.release(holder)
        self._saving.discard(name)

    # -- internals

    def _index(self, size_bytes: int, journal: BlockJournal) -> ArenaIndex:
        index = ArenaIndex(1, size_bytes, journal)
        index.register(NAMESPACE, self.block_bytes)
        return index

    def _holder(self, owner: str) -> Holder:
        self._numbers += 1
        return Holder(owner, self._numbers)

    def _turn(self) -> None:
        """Send the KV events to the proxy."""
        self._news.turn(self._stats, self.world.now)
        self.world.later(FLUSH_EVERY_S, self._turn)

    def _stats(self) -> dict[str, float]:
        stats = {"ram_used_bytes": float(self.ram.occupancy.used_bytes)}
        if self.disk is not None:
            stats["disk_used_bytes"] = float(self.disk.occupancy.used_bytes)
        return stats
