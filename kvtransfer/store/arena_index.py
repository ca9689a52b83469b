"""Where each block lies in the RAM arena, its readers and writers, and what is evicted. Pure: no bytes, no clock.

    (absent) ── reserve ──► writing ── commit ──► ready ── acquire ──► read by holders ── release ──► ready
                               └── release ──► (absent)   └── evicted, oldest first, when it has no reader ──► (absent)

A *holder* is one lookup or put of one worker; `release` and `release_owner` give back all that it has, so that a dead
worker leaves nothing behind. The arena is cut into equal regions; a region belongs to one size of block, so namespaces
with equal blocks share room, and the others take regions from each other down to equal shares. A slot is a block's
place in a region; it is reused only when it has no reader and is not being written. `check()` proves the sum.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.kvtransfer.blocks.events import BlockJournal
from baton.node.errors import InvariantBroken, SettingsError

MAX_NAMESPACES = 16


class Key(NamedTuple):
    """A block's name; the namespace is part of it, so blocks of different models never meet."""

    namespace: bytes
    hash: bytes


class Holder(NamedTuple):
    """What `owner`, an endpoint identity, calls `id`."""

    owner: str
    id: int


@dataclass(slots=True, eq=False)
class Entry:
    """A block in the arena, or on its way there (then it has no digest)."""

    key: Key
    offset: int
    size_bytes: int
    digest: bytes = b""
    readers: int = 0
    dropped: bool = False
    """It is not found any more; the slot is free when the last reader has gone."""


@dataclass(slots=True)
class _Class:
    """All blocks of one size."""

    block_bytes: int
    slots_a_region: int
    regions: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)
    ready: OrderedDict[Key, Entry] = field(default_factory=OrderedDict)  # oldest first


@dataclass(slots=True)
class _Held:
    reading: dict[Entry, None] = field(default_factory=dict)
    """Each once, however often it was asked for."""
    writing: dict[Key, Entry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Bytes of the arena: in ready blocks, and in all."""

    blocks: int
    used_bytes: int
    total_bytes: int


class ArenaIndex:
    """The index of one arena. One thread makes all calls; each happens whole or not at all.

    `journal` gets each hash that can be found from now on, or no longer.
    """

    def __init__(self, num_regions: int, region_bytes: int, journal: BlockJournal) -> None:
        if num_regions < 1 or region_bytes < 1:
            raise ValueError(f"{num_regions} regions of {region_bytes} bytes")
        self.evictions: Counter[str] = Counter(room=0, region=0, damaged=0)
        """Blocks that had to go, by reason."""
        self._journal = journal
        self._num_regions = num_regions
        self._region_bytes = region_bytes
        self._free_regions = list(range(num_regions - 1, -1, -1))
        self._class_of: dict[bytes, _Class] = {}  # by namespace
        self._classes: dict[int, _Class] = {}  # by block_bytes
        self._entries: dict[Key, Entry] = {}  # ready or being written
        self._held: dict[Holder, _Held] = {}
        self._dropped = 0

    # ---- namespaces ---------------------------------------------------------------------------------------------

    def register(self, namespace: bytes, block_bytes: int) -> None:
        """Take blocks of this namespace from now on; repeated: no effect.

        Raises SettingsError if a block fits no region, the size contradicts an earlier one, or there are too many.
        """
        known = self._class_of.get(namespace)
        if known is not None:
            if known.block_bytes != block_bytes:
                raise SettingsError(f"blocks of {block_bytes} bytes; in this namespace they have {known.block_bytes}")
            return
        if len(self._class_of) == MAX_NAMESPACES:
            raise SettingsError(f"this store has {MAX_NAMESPACES} namespaces already")
        if not 1 <= block_bytes <= self._region_bytes:
            raise SettingsError(f"blocks of {block_bytes} bytes do not fit regions of {self._region_bytes}")
        slots = self._region_bytes // block_bytes
        self._class_of[namespace] = self._classes.setdefault(block_bytes, _Class(block_bytes, slots))

    # ---- reading ------------------------------------------------------------------------------------------------

    def find(self, key: Key) -> Entry | None:
        """The block, if it is ready; it is not held."""
        entry = self._entries.get(key)
        return entry if entry is not None and entry.digest else None

    def acquire(self, key: Key, holder: Holder) -> Entry | None:
        """The block, if it is ready, held until `release`."""
        entry = self.find(key)
        if entry is None:
            return None
        reading = self._held.setdefault(holder, _Held()).reading
        if entry not in reading:
            reading[entry] = None
            entry.readers += 1
        return entry

    def touch(self, keys: Sequence[Key]) -> None:
        """A chain has been used: it goes last, and its tail before its head."""
        for key in reversed(keys):
            if (entry := self.find(key)) is not None:
                self._class_of[key.namespace].ready.move_to_end(entry.key)

    # ---- writing ------------------------------------------------------------------------------------------------

    def reserve(self, key: Key, holder: Holder) -> Entry | None:
        """A slot to write the block into; None if it is here, being written, or there is no room."""
        if key in self._entries:
            return None
        blocks = self._class_of[key.namespace]
        offset = self._slot(blocks)
        if offset is None:
            return None
        entry = self._entries[key] = Entry(key, offset, blocks.block_bytes)
        self._held.setdefault(holder, _Held()).writing[key] = entry
        return entry

    def commit(self, key: Key, holder: Holder, digest: bytes) -> bool:
        """The block is written: others may find it. False if the holder has no slot for it (any more)."""
        assert digest, "a committed block has a digest"
        held = self._held.get(holder)
        entry = held.writing.pop(key, None) if held is not None else None
        if entry is None:
            return False
        entry.digest = digest
        self._class_of[key.namespace].ready[key] = entry
        self._journal.stored(key.hash)
        return True

    # ---- letting go ---------------------------------------------------------------------------------------------

    def release(self, holder: Holder) -> None:
        """Give back all that is held: reads end, slots that were not committed are free. May be repeated."""
        held = self._held.pop(holder, None)
        if held is None:
            return
        for entry in held.reading:
            entry.readers -= 1
            if entry.dropped and not entry.readers:
                self._dropped -= 1
                self._free(entry)
        for key, entry in held.writing.items():
            del self._entries[key]
            self._free(entry)

    def release_owner(self, owner: str) -> int:
        """Give back all that this owner holds; returns how many holders it had."""
        holders = [holder for holder in self._held if holder.owner == owner]
        for holder in holders:
            self.release(holder)
        return len(holders)

    def drop(self, key: Key) -> None:
        """Forget a ready block because its bytes are not what they should be."""
        if self.find(key) is not None:
            self._remove(key, "damaged")

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def occupancy(self) -> Occupancy:
        ready = [(len(blocks.ready), blocks.block_bytes) for blocks in self._classes.values()]
        used = sum(count * size for count, size in ready)
        return Occupancy(sum(count for count, _ in ready), used, self._num_regions * self._region_bytes)

    @property
    def num_holders(self) -> int:
        return len(self._held)

    def check(self) -> None:
        """Recompute all from scratch; raises InvariantBroken where something disagrees."""
        reading = [entry for held in self._held.values() for entry in held.reading]
        writing = [entry for held in self._held.values() for entry in held.writing.values()]
        dropped = {id(entry): entry for entry in reading if entry.dropped}
        ready = [entry for blocks in self._classes.values() for entry in blocks.ready.values()]
        _require(len(dropped) == self._dropped, "dropped blocks are miscounted")
        _require(sorted(id(e) for e in [*ready, *writing]) == sorted(map(id, self._entries.values())), "entries differ")
        readers = Counter(id(entry) for entry in reading)
        for entry in [*ready, *dropped.values()]:
            _require(entry.readers == readers[id(entry)], f"{entry} has other readers")
        owned = [region for blocks in self._classes.values() for region in blocks.regions]
        _require(sorted([*owned, *self._free_regions]) == list(range(self._num_regions)), "regions are lost or shared")
        for blocks in self._classes.values():
            used = [e.offset for e in [*ready, *writing, *dropped.values()] if e.size_bytes == blocks.block_bytes]
            slots = [offset for region in blocks.regions for offset in self._offsets(blocks, region)]
            _require(sorted([*used, *blocks.free]) == sorted(slots), f"slots of {blocks.block_bytes} bytes disagree")

    # ---- inside -------------------------------------------------------------------------------------------------

    def _slot(self, blocks: _Class) -> int | None:
        """A free slot; in this order: one that is free, a free region, a region of a size that has too many, the
        oldest block's."""
        if blocks.free:
            return blocks.free.pop()
        if self._free_regions:
            self._give(blocks, self._free_regions.pop())
        elif not self._take_over(blocks):
            oldest = next((key for key, entry in blocks.ready.items() if not entry.readers), None)
            if oldest is None:
                return None
            self._remove(oldest, "room")
        return blocks.free.pop()

    def _take_over(self, blocks: _Class) -> bool:
        """Take an unused region from the size with the most, if that has more than its share."""
        share = max(1, self._num_regions // len(self._classes))
        richest = max(self._classes.values(), key=lambda other: len(other.regions))
        if len(blocks.regions) >= share or len(richest.regions) <= share or richest is blocks:
            return False
        busy = {self._region(entry) for entry in self._entries.values() if entry.readers or not entry.digest}
        busy |= {self._region(entry) for held in self._held.values() for entry in held.reading}
        region = next((region for region in sorted(richest.regions) if region not in busy), None)
        if region is None:
            return False
        for key in [key for key, entry in richest.ready.items() if self._region(entry) == region]:
            self._remove(key, "region")
        richest.regions.remove(region)
        richest.free = [offset for offset in richest.free if offset // self._region_bytes != region]
        self._give(blocks, region)
        return True

    def _give(self, blocks: _Class, region: int) -> None:
        blocks.regions.add(region)
        blocks.free += self._offsets(blocks, region)[::-1]

    def _offsets(self, blocks: _Class, region: int) -> list[int]:
        start = region * self._region_bytes
        return [start + slot * blocks.block_bytes for slot in range(blocks.slots_a_region)]

    def _region(self, entry: Entry) -> int:
        return entry.offset // self._region_bytes

    def _remove(self, key: Key, reason: str) -> None:
        """A ready block cannot be found any more; its slot is free once it has no reader."""
        entry = self._entries.pop(key)
        del self._class_of[key.namespace].ready[key]
        self.evictions[reason] += 1
        self._journal.removed(key.hash)
        if entry.readers:
            entry.dropped = True
            self._dropped += 1
        else:
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        self._classes[entry.size_bytes].free.append(entry.offset)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvariantBroken(otherwise)
