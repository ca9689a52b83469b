"""Records as values of LMDB: one environment a namespace, a value is header and block, one transaction a record.

    blocks   key -> record (record.py)
    ticks    key -> u64, when it was last used; kept apart so that a use does not rewrite a block, nor opening read all

The quota gives the size of the file. It is kept 15 % free, for pages that were freed are used again only two
transactions later, and later still if a reader (another process, looking in) holds a snapshot.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np

from baton.kvtransfer.store.disk.base import Changed, Miss, ignore_change
from baton.kvtransfer.store.disk.folder import Boot, Contents, TierFolder, Trust
from baton.kvtransfer.store.disk.lmdb_environment import PAGE_BYTES, LmdbEnvironment
from baton.kvtransfer.store.disk.record import HEADER_BYTES, check_namespace, check_record, pack_header
from baton.kvtransfer.store.disk.records import Block, RecordFault, StorageBroken
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.node.errors import SettingsError

SIDE_BYTES = 64 << 10
"""Of the quota: LMDB's table of readers, and the folder's own files."""
FILL = 0.85
SPARE_RECORDS = 3
SPARE_PAGES = 32
_PAGE_HEADER_BYTES = 16
_TREE_PAGES_A_RECORD = 0.25
"""Two entries of 50 bytes, in pages half full, and copies while they are changed."""
_TICK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LmdbGeometry:
    """What a quota gives."""

    map_bytes: int
    capacity_blocks: int

    @classmethod
    def of(cls, quota_bytes: int, block_bytes: int) -> LmdbGeometry:
        """Raises SettingsError if there is no room for a single block."""
        pages = (quota_bytes - SIDE_BYTES) // PAGE_BYTES
        record_pages = -(-(_PAGE_HEADER_BYTES + HEADER_BYTES + block_bytes) // PAGE_BYTES)
        usable = min(pages * FILL, pages - SPARE_PAGES - SPARE_RECORDS * record_pages)
        capacity_blocks = int(usable / (record_pages + _TREE_PAGES_A_RECORD))
        if capacity_blocks < 1:
            raise SettingsError(f"a quota of {quota_bytes} bytes is too small for blocks of {block_bytes} in LMDB")
        return cls(pages * PAGE_BYTES, capacity_blocks)


class LmdbRecords:
    """Records (records.py) in `folder`, which it closes in the end."""

    def __init__(self, folder: TierFolder, namespace: bytes, block_bytes: int, geometry: LmdbGeometry) -> None:
        """Raises what LmdbEnvironment does; the folder stays open then."""
        self.capacity_blocks = geometry.capacity_blocks
        self._folder = folder
        self._namespace = namespace
        self._record = bytearray(HEADER_BYTES + block_bytes)  # one is written at a time
        self._environment = LmdbEnvironment(folder.data, geometry.map_bytes, (b"blocks", b"ticks"))
        self._blocks = self._environment.database(b"blocks")
        self._ticks = self._environment.database(b"ticks")

    def load(self) -> list[tuple[bytes, int]]:
        # Not from `blocks`: py-lmdb touches all pages of a value that a cursor comes to, even if only keys are wanted.
        with self._environment.reading() as txn:
            entries = [(bytes(key), bytes(tick)) for key, tick in txn.cursor(self._ticks)]
        return [(key, _TICK.unpack(tick)[0]) for key, tick in entries if len(tick) == _TICK.size]

    def read(self, key: bytes, into: memoryview) -> bytes:
        with self._environment.reading() as txn:
            record = txn.get(key, db=self._blocks)
            if record is None:
                raise RecordFault(Miss.ABSENT)
            if len(record) != HEADER_BYTES + into.nbytes:
                raise RecordFault(Miss.TRUNCATED)
            header = bytes(record[:HEADER_BYTES])
            _copy(into, memoryview(record)[HEADER_BYTES:])
        return check_record(header, into, self._namespace, key)

    def write(self, key: bytes, block: Block, tick: int, victims: Sequence[bytes], ticks: Mapping[bytes, int]) -> None:
        self._record[:HEADER_BYTES] = pack_header(self._namespace, key, tick, block.data, block.digest)
        _copy(memoryview(self._record)[HEADER_BYTES:], block.data)

        def work(txn: lmdb.Transaction) -> None:
            self._remove(txn, victims)
            self._note(txn, {**ticks, key: tick})
            txn.put(key, self._record, db=self._blocks)

        self._environment.change(work)

    def remove(self, keys: Sequence[bytes]) -> None:
        self._environment.change(lambda txn: self._remove(txn, keys))

    def note(self, ticks: Mapping[bytes, int]) -> None:
        self._environment.change(lambda txn: self._note(txn, ticks))

    def check(self) -> None:
        self._environment.check()

    def close(self) -> None:
        self._environment.sync()
        self._folder.end()
        self.abandon()

    def abandon(self) -> None:
        self._environment.close()
        self._folder.close()

    def discard(self) -> None:
        self._environment.close()
        self._folder.discard("broken")
        self._folder.close()

    def _remove(self, txn: lmdb.Transaction, keys: Sequence[bytes]) -> None:
        for key in keys:
            txn.delete(key, db=self._blocks)
            txn.delete(key, db=self._ticks)

    def _note(self, txn: lmdb.Transaction, ticks: Mapping[bytes, int]) -> None:
        for key, tick in ticks.items():
            txn.put(key, _TICK.pack(tick), db=self._ticks)


def open_lmdb_records(path: Path, namespace: bytes, block_bytes: int, quota_bytes: int, boot: Boot) -> LmdbRecords:
    """What is good in the folder `path` is kept, anything else set aside. Raises SettingsError if it cannot be used."""
    check_namespace(namespace)
    geometry = LmdbGeometry.of(quota_bytes, block_bytes)
    with TierFolder.opening(path, Contents("lmdb", namespace, block_bytes, quota_bytes), boot) as folder:
        if folder.trust is Trust.MIXED:
            folder.discard("the machine went down")
        folder.begin()
        try:
            return LmdbRecords(folder, namespace, block_bytes, geometry)
        except StorageBroken as broken:
            folder.discard(str(broken))
        return LmdbRecords(folder, namespace, block_bytes, geometry)


def lmdb_tier(
    path: Path,
    namespace: bytes,
    block_bytes: int,
    quota_bytes: int,
    on_change: Changed = ignore_change,
    clock: Callable[[], float] = time.monotonic,
    boot: Callable[[], Boot] = Boot.now,
) -> RecordTier:
    """A tier in the folder `path`, all of whose files together never take more than `quota_bytes`."""

    def open_records() -> LmdbRecords:
        return open_lmdb_records(path, namespace, block_bytes, quota_bytes, boot())

    return RecordTier("lmdb", block_bytes, open_records, on_change, clock)


def _copy(into: memoryview, source: memoryview) -> None:
    """By numpy, which lets other threads run while pages come from the disk."""
    np.copyto(np.frombuffer(into, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
