"""One LMDB environment, as safe as a cache needs it: its errors are ours, its file has its full size from the start.

The file is preallocated to the size of the map and never grows, so a disk that others fill does no harm. `sync` is off
while it is open (folder.py explains why that is sound); the map is read-only, so a stray write cannot reach the file.
LMDB reads through its mapping, so a file that was cut short would end the process: both of its files are looked at
before every transaction (file_watch.py). Sources: https://lmdb.readthedocs.io, and lmdb.h (MDB_NOSYNC, caveats).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import lmdb

from baton.kvtransfer.store.disk.allocate import allocate
from baton.kvtransfer.store.disk.base import Miss, Refusal
from baton.kvtransfer.store.disk.file_watch import FileWatch
from baton.kvtransfer.store.disk.records import RecordFault, StorageBroken, WriteFault
from baton.node.errors import SettingsError

PAGE_BYTES = min(PAGESIZE, 32768)  # LMDB's
CHECK_READERS_EVERY = 64
"""Changes. A reader that died (another process, looking in) would keep freed pages from being used again."""
TURN = b"turn"
"""In the root, beside the names of the databases: a number, written only to begin a new transaction."""

Database = Any
"""LMDB's handle of a database; its class has no public name."""


class LmdbEnvironment:
    """`path` is a folder that exists. Reads run beside each other and beside one change."""

    def __init__(self, path: Path, map_bytes: int, names: Sequence[bytes]) -> None:
        """Raises StorageBroken if what lies there is not sound, SettingsError if the disk does not allow it."""
        self._num_changes = 0
        self._watches: list[FileWatch] = []
        with _translated(_cannot_open):
            self._environment = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=len(names),
                mode=0o600,
                sync=False,
                writemap=False,
                readahead=True,  # without it a value is read page by page
            )
        try:
            with _translated(_cannot_open):
                _preallocate(path / "data.mdb", (self._environment.info()["last_pgno"] + 1) * PAGE_BYTES, map_bytes)
                for name in ("data.mdb", "lock.mdb"):
                    self._watches.append(FileWatch(path / name))
                self._environment.reader_check()
                self._databases = {name: self._environment.open_db(name) for name in names}
        except BaseException:
            self.close()
            raise

    def database(self, name: bytes) -> Database:
        return self._databases[name]

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """A snapshot for one read (a page that cannot be read spoils the whole transaction). RecordFault."""
        self.check()
        with _translated(_cannot_read), self._environment.begin(buffers=True) as txn:
            yield txn

    def change(self, work: Callable[[lmdb.Transaction], object]) -> None:
        """All that `work` writes, or WriteFault and nothing. It may be called twice, each time with the old state."""
        self._num_changes += 1
        if self._num_changes % CHECK_READERS_EVERY == 0:
            self._forget_dead_readers()
        try:
            self._change(work)
        except WriteFault as fault:
            if fault.refusal is not Refusal.FULL:
                raise
            # Freed pages wait for dead readers, and for two further transactions whatever these do.
            self._forget_dead_readers()
            self._change(lambda txn: txn.put(TURN, self._num_changes.to_bytes(8, "little")))
            self._change(work)

    def check(self) -> None:
        """Raises StorageBroken if a file is gone, replaced or cut short."""
        for watch in self._watches:
            watch.check()

    def sync(self) -> None:
        """All is on the disk when it returns. WriteFault."""
        with _translated(_cannot_write):
            self._environment.sync(True)

    def close(self) -> None:
        """Only without readers: the mapping goes. LMDB looks into the table of readers once more."""
        for watch in self._watches:
            with suppress(OSError):
                watch.restore_size()
        self._environment.close()
        for watch in self._watches:  # not earlier: closing a file ends the process's locks on it, and LMDB holds some
            watch.close()
        self._watches.clear()

    def _change(self, work: Callable[[lmdb.Transaction], object]) -> None:
        self.check()
        with _translated(_cannot_write), self._environment.begin(write=True, buffers=True) as txn:
            work(txn)

    def _forget_dead_readers(self) -> None:
        with _translated(_cannot_write):
            self._environment.reader_check()


def _preallocate(path: Path, used_bytes: int, size_bytes: int) -> None:
    """Give the file its full size. Raises StorageBroken if it ends before the pages that are in use."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found_bytes = os.fstat(fd).st_size
        if found_bytes < used_bytes:
            raise StorageBroken(Miss.TRUNCATED, f"a file of {found_bytes} bytes instead of {used_bytes}")
        allocate(fd, size_bytes)
    finally:
        os.close(fd)


_BROKEN = (
    lmdb.BadRslotError,
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.MapResizedError,  # no other process changes the size: what says so is damaged
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)


@contextmanager
def _translated(otherwise: Callable[[str], Exception]) -> Iterator[None]:
    """Errors of LMDB and of the system as ours; `otherwise` is for those that say nothing of the environment."""
    try:
        yield
    except _BROKEN as error:
        raise StorageBroken(Miss.CORRUPT, str(error)) from error
    except lmdb.PanicError as error:  # it could not write its root; what is on the disk is whole
        raise StorageBroken(Miss.IO_ERROR, str(error), keep=True) from error
    except lmdb.MapFullError as error:
        raise WriteFault(Refusal.FULL, str(error)) from error
    except (lmdb.Error, OSError) as error:
        raise otherwise(str(error)) from error


def _cannot_open(cause: str) -> Exception:
    return SettingsError(f"cannot open an LMDB environment: {cause}")


def _cannot_read(cause: str) -> Exception:
    return RecordFault(Miss.IO_ERROR)


def _cannot_write(cause: str) -> Exception:
    return WriteFault(Refusal.IO_ERROR, cause)
