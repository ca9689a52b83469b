"""The one policy over every storage of records: least recently used goes first, and a fault is a miss or a refusal.

Two locks, taken in this order. `_writing` is held for a whole write, so storages are written by one at a time;
`_state` for moments, over what is held, read and counted. A read holds neither while it copies, and never waits for a
write: it pins its key, and a pinned record is not removed. A key that leaves is marked for removal, held no more,
until the storage is swept: at once if there is no reader or writer, else by a later read or write.

A storage that breaks is taken out of service: every get misses and every put is refused until, at the earliest
REOPEN_AFTER_S later and when it has no readers any more, `maintain` or a put opens it anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock

from baton.kvtransfer.store.disk.base import (
    Changed,
    Eviction,
    Miss,
    Refusal,
    TierStats,
    check_buffer,
    check_digest,
    check_keys,
    ignore_change,
)
from baton.kvtransfer.store.disk.counters import TierCounters
from baton.kvtransfer.store.disk.readers import Readers
from baton.kvtransfer.store.disk.recency import Recency
from baton.kvtransfer.store.disk.records import Block, RecordFault, Records, StorageBroken, WriteFault
from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

PAUSE_S = 30.0
"""No write is tried for so long after one failed: a full disk does not become empty by asking often."""
REOPEN_AFTER_S = 10.0
CLOSE_WITHIN_S = 30.0
"""How long `close` waits for reads; a copy that hangs longer (a dead disk) is left to the end of the process."""
SAVE_AT = 1024
"""So many uses that are only in memory are saved even if nothing is written."""
SAVE_WITH_A_WRITE = 256
EVICT_WHEN_FULL = 20
"""A twentieth of the blocks goes when the storage is full before its capacity is reached."""

logger = logging.getLogger(__name__)


class RecordTier:
    """A Tier (base.py) over records (records.py)."""

    def __init__(
        self,
        name: str,
        block_bytes: int,
        open_records: Callable[[], Records],
        on_change: Changed = ignore_change,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_records` opens the storage, now and after it broke. It raises SettingsError if that is not possible."""
        self.name = name
        self.block_bytes = block_bytes
        self._open_records = open_records
        self._on_change = on_change
        self._clock = clock
        self._writing = Lock()
        self._state = Lock()
        self._counters = TierCounters()
        self._recency = Recency()
        self._readers = Readers(self._state)
        self._to_remove: dict[bytes, None] = {}  # in their order: no longer held, still in the storage
        self._records: Records | None = None  # None: out of service
        self._broken: tuple[Records, StorageBroken] | None = None  # to be ended when it has no readers
        self._retry_at_s = 0.0  # no write, and no reopening, before
        self._closed = False
        self._open()

    # -- calls of the interface

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        check_keys(keys)
        with self._state:
            return [key in self._recency for key in keys]

    def keys(self) -> list[bytes]:
        with self._state:
            return self._recency.keys()

    def stats(self) -> TierStats:
        with self._state:
            capacity = self._records.capacity_blocks if self._records is not None else 0
            return self._counters.snapshot(len(self._recency), capacity)

    def get(self, key: bytes, into: memoryview) -> bytes | None:
        check_keys([key])
        check_buffer(into, self.block_bytes)
        records = self._pin(key)
        if records is None:
            return None
        begin_s = self._clock()
        try:
            digest = records.read(key, into)
        except RecordFault as fault:
            self._unpin(key, fault.miss)
            return None
        except StorageBroken as fault:
            self._break(records, fault)
            self._unpin(key, fault.miss)
            return None
        self._unpin(key, None, self._clock() - begin_s)
        return digest

    def put(self, key: bytes, data: memoryview, digest: bytes) -> bool:
        check_keys([key])
        check_digest(digest)
        check_buffer(data, self.block_bytes)
        with self._state:
            if key in self._recency:
                self._recency.touch(key)
                return True
        with self._writing:
            refusal = self._put(key, Block(data, digest))
        if refusal is not None:
            with self._state:
                self._counters.refused(refusal)
        return refusal is None

    def drop(self, keys: Sequence[bytes]) -> None:
        check_keys(keys)
        with self._writing:
            with self._state:
                self._mark_for_removal(keys, Eviction.DROPPED)
            self._sweep()

    def maintain(self) -> None:
        if not self._writing.acquire(blocking=False):
            return  # a write does both
        try:
            if self._records is not None:
                self._check(self._records)
            elif not self._closed and self._clock() >= self._retry_at_s:
                self._reopen()
        finally:
            self._writing.release()

    def close(self) -> None:
        with self._writing:
            self._sweep()
            with self._state:
                if self._closed:
                    return
                self._closed = True
                records, self._records = self._records, None
                ticks = self._recency.take_unsaved(len(self._recency))
                self._recency = Recency()
                unread = self._readers.wait_for_none(CLOSE_WITHIN_S)
            if not unread:
                return
            self._end_broken()
            if records is not None:
                try:
                    records.note(ticks)
                    records.close()
                except (WriteFault, StorageBroken) as fault:
                    log_event(logger, "tier_close_failed", level=logging.WARNING, tier=self.name, cause=str(fault))
                    records.abandon()

    # -- reading

    def _pin(self, key: bytes) -> Records | None:
        """The storage to read `key` from; None: it is a miss, and counted."""
        with self._state:
            if self._records is None:
                self._counters.miss(Miss.IO_ERROR)
                return None
            if key not in self._recency:
                self._counters.miss(Miss.ABSENT)
                return None
            self._readers.add(key)
            return self._records

    def _unpin(self, key: bytes, miss: Miss | None, duration_s: float = 0.0) -> None:
        """End a read: count it, and remember the use, or let go what cannot be read."""
        with self._state:
            self._readers.remove(key)
            if miss is not None:
                self._counters.miss(miss)
                self._mark_for_removal([key], Eviction.FAULT)
            else:
                self._counters.hit(self.block_bytes, duration_s)
                if key in self._recency:
                    self._recency.touch(key)
            tidy = key in self._to_remove or self._recency.num_unsaved >= SAVE_AT
        if tidy and self._writing.acquire(blocking=False):  # else a write runs, which will do it
            try:
                self._sweep()
                self._save()
            finally:
                self._writing.release()

    def _mark_for_removal(self, keys: Iterable[bytes], reason: Eviction) -> None:
        """Hold them no more; `_state` is held by the caller."""
        gone = [key for key in keys if self._recency.remove(key)]
        self._report(gone, False)
        self._counters.evicted(reason, len(gone))
        self._to_remove.update(dict.fromkeys(gone))

    # -- writing; `_writing` is held by the caller

    def _put(self, key: bytes, block: Block) -> Refusal | None:
        if self._closed:
            return Refusal.CLOSED
        if self._clock() < self._retry_at_s:
            return Refusal.PAUSED
        if self._records is None:
            self._reopen()
        self._sweep()
        with self._state:
            records = self._records
            if key in self._recency:
                return None
            if key in self._to_remove:
                return Refusal.BUSY
        if records is None:
            return Refusal.IO_ERROR
        refusal = self._write(records, key, block)
        if refusal is Refusal.FULL:
            self._evict_more()
            refusal = self._write(records, key, block)
        if refusal in (Refusal.FULL, Refusal.IO_ERROR) and self._records is records:
            self._retry_at_s = max(self._retry_at_s, self._clock() + PAUSE_S)
        return refusal

    def _write(self, records: Records, key: bytes, block: Block) -> Refusal | None:
        begin_s = self._clock()
        with self._state:
            if self._records is not records:
                return Refusal.IO_ERROR
            room = records.capacity_blocks - len(self._to_remove)
            victims = self._recency.take_oldest(len(self._recency) + 1 - room, self._readers)
            if len(self._recency) >= room:
                self._recency.put_back(victims)
                return Refusal.BUSY
            tick = self._recency.next_tick()
            ticks = self._recency.take_unsaved(SAVE_WITH_A_WRITE)
        try:
            records.write(key, block, tick, list(victims), ticks)
        except WriteFault as fault:
            log_event(logger, "tier_write_failed", level=logging.WARNING, tier=self.name, cause=str(fault))
            self._undo(records, victims, ticks)
            return fault.refusal
        except StorageBroken as fault:
            self._undo(records, victims, ticks)
            self._break(records, fault)
            return Refusal.IO_ERROR
        with self._state:
            if self._records is records:
                self._report(victims, False)
                self._counters.evicted(Eviction.QUOTA, len(victims))
                self._counters.stored(self.block_bytes, self._clock() - begin_s)
                self._recency.add(key, tick)
                self._report([key], True)
                return None
        self._undo(records, victims, ticks)
        return Refusal.IO_ERROR

    def _undo(self, records: Records, victims: Mapping[bytes, int], ticks: Mapping[bytes, int]) -> None:
        """What a failed write took from the order of use."""
        with self._state:
            if self._records is records:
                self._recency.put_back(victims)
                self._recency.not_saved(ticks)
            else:  # it broke meanwhile, for a reader: these went with the rest
                self._report(victims, False)
                self._counters.evicted(Eviction.DISCARDED, len(victims))

    def _evict_more(self) -> None:
        with self._state:
            oldest = self._recency.keys()[: max(1, len(self._recency) // EVICT_WHEN_FULL)]
            self._mark_for_removal(oldest, Eviction.QUOTA)
        self._sweep()

    def _sweep(self) -> None:
        """Remove from the storage what is marked for removal and not being read."""
        with self._state:
            free = [key for key in self._to_remove if key not in self._readers]
            for key in free:
                del self._to_remove[key]
            records = self._records
        if records is not None and free:
            self._change(records, lambda: records.remove(free))

    def _save(self) -> None:
        """Save uses, if there are many that no write has saved."""
        with self._state:
            records = self._records
            ticks = self._recency.take_unsaved(SAVE_AT) if self._recency.num_unsaved >= SAVE_AT else {}
        if records is not None and ticks:
            self._change(records, lambda: records.note(ticks))

    def _change(self, records: Records, change: Callable[[], None]) -> None:
        """A change that may be lost: a record that comes back is still good, and an old tick is an old tick."""
        try:
            change()
        except WriteFault as fault:
            log_event(logger, "tier_write_failed", level=logging.WARNING, tier=self.name, cause=str(fault))
        except StorageBroken as fault:
            self._break(records, fault)

    # -- opening and breaking

    def _open(self) -> None:
        """In service, or SettingsError."""
        records = self._open_records()
        try:
            entries = records.load()
        except (RecordFault, StorageBroken) as fault:
            log_event(logger, "tier_unreadable", level=logging.WARNING, tier=self.name, cause=str(fault))
            records.discard()
            records, entries = self._open_again()
        with self._state:
            self._records = records
            self._recency = Recency(entries)
            self._report(self._recency.keys(), True)

    def _open_again(self) -> tuple[Records, list[tuple[bytes, int]]]:
        records = self._open_records()
        try:
            return records, records.load()
        except (RecordFault, StorageBroken) as fault:
            records.abandon()
            raise SettingsError(f"{self.name} cannot be read, even begun anew: {fault}") from fault

    def _check(self, records: Records) -> None:
        try:
            records.check()
        except StorageBroken as fault:
            self._break(records, fault)

    def _break(self, records: Records, fault: StorageBroken) -> None:
        """Out of service, unless another thread has seen it already."""
        with self._state:
            if self._records is not records:
                return
            self._records = None
            self._broken = (records, fault)
            self._retry_at_s = self._clock() + REOPEN_AFTER_S
            self._report(self._recency.keys(), False)
            if not fault.keep:
                self._counters.evicted(Eviction.DISCARDED, len(self._recency))
            self._recency = Recency()
            self._to_remove.clear()
        log_event(logger, "tier_broken", level=logging.ERROR, tier=self.name, cause=str(fault), keep=fault.keep)

    def _end_broken(self) -> None:
        if self._broken is not None:
            records, fault = self._broken
            self._broken = None
            if fault.keep:
                records.abandon()
            else:
                records.discard()

    def _reopen(self) -> None:
        """Try to be in service again; see `_records`."""
        with self._state:
            if len(self._readers):
                return
        self._end_broken()
        try:
            self._open()
        except SettingsError as error:
            self._retry_at_s = self._clock() + REOPEN_AFTER_S
            log_event(logger, "tier_reopen_failed", level=logging.WARNING, tier=self.name, cause=str(error))
        else:
            log_event(logger, "tier_reopened", tier=self.name, blocks=len(self._recency))

    def _report(self, keys: Iterable[bytes], held: bool) -> None:
        for key in keys:
            self._on_change(key, held)
