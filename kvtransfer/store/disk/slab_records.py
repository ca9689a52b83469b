"""Records in slots of one big file, with LMDB as the index.

    data/slots    SlotFile: a slot is header and block
    data/index/   SlabIndex: key -> slot and tick

The index says where to look, the header and digest in the slot say what is there; so a slot that was overwritten, torn
or never written is a miss, whatever the index believed, and nothing needs to be synced in order. A record goes into a
free slot (one is always kept), and the index learns of it, and of what left, in one transaction afterwards.

An index that is lost (the machine went down, the file is damaged) is made again from the headers: old records come
back, and some that had been evicted. Their keys name their content, so they are as good as ever.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from baton.kvtransfer.store.disk.base import Changed, ignore_change
from baton.kvtransfer.store.disk.folder import Boot, Contents, TierFolder, Trust
from baton.kvtransfer.store.disk.record import Header, check_namespace, check_record, pack_header, parse_header
from baton.kvtransfer.store.disk.records import Block, RecordFault
from baton.kvtransfer.store.disk.slab_index import (
    INDEX_BYTES_A_SLOT,
    SlabIndex,
    SlotPlace,
    index_bytes,
    remove_index,
)
from baton.kvtransfer.store.disk.slot_file import OpenFile, SlotFile, slot_bytes
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

SIDE_BYTES = 64 << 10
"""Of the quota: LMDB's table of readers, and the folder's own files."""
SPARE_SLOTS = 1
SCAN_WITHIN_S = 60.0
"""Records whose headers are not reached in this time are given up."""

logger = logging.getLogger(__name__)


class SlabRecords:
    """Records (records.py) in `folder`, which it closes in the end."""

    def __init__(self, folder: TierFolder, namespace: bytes, slots: SlotFile, index: SlabIndex, num_slots: int) -> None:
        self.capacity_blocks = num_slots - SPARE_SLOTS
        self._folder = folder
        self._namespace = namespace
        self._slots = slots
        self._index = index
        self._num_slots = num_slots
        self._places: dict[bytes, int] = {}  # key -> slot
        self._free: list[int] = []  # the next to be used is the last

    def load(self) -> list[tuple[bytes, int]]:
        kept: list[tuple[bytes, int]] = []
        used: set[int] = set()
        for key, (slot, tick) in sorted(self._index.entries(), key=lambda entry: -entry[1].tick):
            if slot < self._num_slots and slot not in used and len(kept) < self.capacity_blocks:
                used.add(slot)
                self._places[key] = slot
                kept.append((key, tick))
        self._free = [slot for slot in reversed(range(self._num_slots)) if slot not in used]
        return kept

    def read(self, key: bytes, into: memoryview) -> bytes:
        header = self._slots.read(self._places[key], into)
        return check_record(header, into, self._namespace, key)

    def write(self, key: bytes, block: Block, tick: int, victims: Sequence[bytes], ticks: Mapping[bytes, int]) -> None:
        slot = self._free[-1]
        header = pack_header(self._namespace, key, tick, block.data, block.digest)
        self._slots.write(slot, header, block.data)
        self._index.change(victims, {**self._placed(ticks), key: SlotPlace(slot, tick)})
        self._free.pop()
        self._places[key] = slot
        self._release(victims)

    def remove(self, keys: Sequence[bytes]) -> None:
        try:
            self._index.change(keys, {})
        finally:
            self._release(keys)  # an entry that stays in the index is a miss once its slot has another record

    def note(self, ticks: Mapping[bytes, int]) -> None:
        self._index.change((), self._placed(ticks))

    def check(self) -> None:
        self._slots.check()
        self._index.check()

    def close(self) -> None:
        self._slots.sync()
        self._index.sync()
        self._folder.end()
        self.abandon()

    def abandon(self) -> None:
        self._index.close()
        self._slots.close()
        self._folder.close()

    def discard(self) -> None:
        """Only the index: each slot is checked when it is read."""
        self._index.close()
        self._slots.close()
        try:
            remove_index(self._index.path)
        except OSError as error:
            log_event(logger, "tier_discard_failed", level=logging.ERROR, cause=str(error))
        self._folder.close()

    def _release(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            slot = self._places.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    def _placed(self, ticks: Mapping[bytes, int]) -> dict[bytes, SlotPlace]:
        return {key: SlotPlace(self._places[key], tick) for key, tick in ticks.items() if key in self._places}


def open_slab_records(
    path: Path,
    namespace: bytes,
    block_bytes: int,
    quota_bytes: int,
    boot: Boot,
    open_file: OpenFile = os.open,
    clock: Callable[[], float] = time.monotonic,
) -> SlabRecords:
    """What is good in the folder `path` is kept. Raises SettingsError if it cannot be used."""
    check_namespace(namespace)
    num_slots = num_slots_of(quota_bytes, block_bytes)
    with TierFolder.opening(path, Contents("slab", namespace, block_bytes, quota_bytes), boot) as folder:
        index_path = folder.data / "index"
        if folder.trust is Trust.MIXED:
            remove_index(index_path)
        folder.begin()
        slots = SlotFile(folder.data / "slots", num_slots, block_bytes, open_file)
        try:
            index = SlabIndex(index_path, num_slots)
            try:
                if not index.is_complete():
                    empty = folder.trust is Trust.EMPTY
                    index.fill({} if empty else _scan(slots, num_slots, namespace, block_bytes, clock))
                return SlabRecords(folder, namespace, slots, index, num_slots)
            except BaseException:
                index.close()
                raise
        except BaseException:
            slots.close()
            raise


def num_slots_of(quota_bytes: int, block_bytes: int) -> int:
    """What a quota gives. Raises SettingsError if there is no room for a single block."""
    free_bytes = quota_bytes - SIDE_BYTES - index_bytes(0)
    num_slots = free_bytes // (slot_bytes(block_bytes) + INDEX_BYTES_A_SLOT)
    if num_slots <= SPARE_SLOTS:
        raise SettingsError(f"a quota of {quota_bytes} bytes is too small for blocks of {block_bytes} in a slab")
    return num_slots


def slab_tier(
    path: Path,
    namespace: bytes,
    block_bytes: int,
    quota_bytes: int,
    on_change: Changed = ignore_change,
    clock: Callable[[], float] = time.monotonic,
    boot: Callable[[], Boot] = Boot.now,
    open_file: OpenFile = os.open,
) -> RecordTier:
    """A tier in the folder `path`, all of whose files together never take more than `quota_bytes`."""

    def open_records() -> SlabRecords:
        return open_slab_records(path, namespace, block_bytes, quota_bytes, boot(), open_file, clock)

    return RecordTier("slab", block_bytes, open_records, on_change, clock)


def _scan(
    slots: SlotFile, num_slots: int, namespace: bytes, block_bytes: int, clock: Callable[[], float]
) -> dict[bytes, SlotPlace]:
    """What the headers of this namespace say; of two under one key the later."""
    found: dict[bytes, SlotPlace] = {}
    until_s = clock() + SCAN_WITHIN_S
    for slot in range(num_slots):
        if clock() > until_s:
            log_event(logger, "tier_scan_cut_short", level=logging.WARNING, slots=slot, of=num_slots)
            break
        header = _header(slots, slot, namespace)
        if header is None or header.payload_bytes != block_bytes:
            continue
        if header.key not in found or found[header.key].tick < header.tick:
            found[header.key] = SlotPlace(slot, header.tick)
    return found


def _header(slots: SlotFile, slot: int, namespace: bytes) -> Header | None:
    try:
        return parse_header(slots.read_header(slot), namespace)
    except RecordFault:
        return None
