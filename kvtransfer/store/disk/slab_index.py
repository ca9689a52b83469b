"""Where each record of a slab lies: key -> slot and tick, in LMDB. It can be lost: the slots' headers say it too."""

from __future__ import annotations

import logging
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lmdb
from lmdb.verify import VerifyError, verify

from baton.kvtransfer.store.disk.base import Miss
from baton.kvtransfer.store.disk.lmdb_environment import PAGE_BYTES, LmdbEnvironment
from baton.kvtransfer.store.disk.records import StorageBroken
from baton.node.telemetry import log_event

_BASE_BYTES = 256 << 10
INDEX_BYTES_A_SLOT = 512
"""An entry is 60 bytes; pages are half full at worst, and many are copied at once when much is evicted."""
_ENTRY = struct.Struct("<QQ")  # slot, tick
_RECORDS, _STATE, _COMPLETE = b"records", b"state", b"complete"

logger = logging.getLogger(__name__)


class SlotPlace(NamedTuple):
    """Of one record."""

    slot: int
    tick: int


def index_bytes(num_slots: int) -> int:
    """What an index of so many slots takes on the disk, at most."""
    return (_BASE_BYTES + INDEX_BYTES_A_SLOT * num_slots) // PAGE_BYTES * PAGE_BYTES


class SlabIndex:
    """In the folder `path`. One change at a time."""

    def __init__(self, path: Path, num_slots: int) -> None:
        """What cannot be read is begun anew. Raises StorageBroken, SettingsError or OSError if that is impossible."""
        self.path = path
        path.mkdir(mode=0o700, exist_ok=True)
        try:
            self._environment = self._open(num_slots)
        except StorageBroken as broken:
            log_event(logger, "tier_index_discarded", level=logging.WARNING, path=str(path), cause=str(broken))
            remove_index(path)
            path.mkdir(mode=0o700)
            self._environment = self._open(num_slots)
        self._records = self._environment.database(_RECORDS)

    def is_complete(self) -> bool:
        """Whether it was ever filled. RecordFault."""
        with self._environment.reading() as txn:
            return txn.get(_COMPLETE, db=self._environment.database(_STATE)) is not None

    def fill(self, places: Mapping[bytes, SlotPlace]) -> None:
        """The first entries. WriteFault."""

        def work(txn: lmdb.Transaction) -> None:
            self._place(txn, places)
            txn.put(_COMPLETE, b"1", db=self._environment.database(_STATE))

        self._environment.change(work)

    def entries(self) -> list[tuple[bytes, SlotPlace]]:
        """RecordFault."""
        with self._environment.reading() as txn:
            entries = [(bytes(key), bytes(entry)) for key, entry in txn.cursor(self._records)]
        return [(key, SlotPlace(*_ENTRY.unpack(entry))) for key, entry in entries if len(entry) == _ENTRY.size]

    def change(self, removed: Sequence[bytes], placed: Mapping[bytes, SlotPlace]) -> None:
        """All of it, or WriteFault."""

        def work(txn: lmdb.Transaction) -> None:
            for key in removed:
                txn.delete(key, db=self._records)
            self._place(txn, placed)

        self._environment.change(work)

    def check(self) -> None:
        """Raises StorageBroken if a file is gone, replaced or cut short."""
        self._environment.check()

    def sync(self) -> None:
        """WriteFault."""
        self._environment.sync()

    def close(self) -> None:
        self._environment.close()

    def _open(self, num_slots: int) -> LmdbEnvironment:
        data = self.path / "data.mdb"
        if data.exists():
            _verify(data)
        return LmdbEnvironment(self.path, index_bytes(num_slots), (_RECORDS, _STATE))

    def _place(self, txn: lmdb.Transaction, placed: Mapping[bytes, SlotPlace]) -> None:
        for key, place in placed.items():
            txn.put(key, _ENTRY.pack(*place), db=self._records)


def _verify(data: Path) -> None:
    """Raises StorageBroken for pages that LMDB must not meet: some damage ends its process instead of raising.

    It takes about 10 us an entry.
    """
    try:
        problems = verify(data)
    except VerifyError as error:
        problems = [str(error)]
    if problems:
        raise StorageBroken(Miss.CORRUPT, f"{problems[0]}, {len(problems)} problems in all")


def remove_index(path: Path) -> None:
    """Raises OSError."""
    if path.exists():
        shutil.rmtree(path)
