"""The folder of one tier on disk: its owner, and whether what lies in it may be trusted.

    PATH/lock        held by flock while a process uses the folder
    PATH/state.json  what the data is, and how the last user ended
    PATH/data/       the storage's own files

Nothing is synced while a tier is in use, so after a crash of the machine the data may be a mixture of old and new
pages; after a mere crash of the process it is whole (the kernel kept its pages). The state file holds the kernel's
boot id and a mark that is set when the tier ends in order and everything is synced: not clean and another boot id means
that the data cannot be trusted. Data that kills its process again and again (pages on which LMDB crashes) is known by
several unclean openings in a minute. What is not trusted is renamed at once, then deleted: it must not be half
trusted after a second crash, nor count against the quota.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import msgspec

from baton.kvtransfer.store.disk.base import Refusal
from baton.kvtransfer.store.disk.records import RecordFault, StorageBroken, WriteFault
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError
from baton.node.host import boot_id as kernel_boot_id
from baton.node.private_files import private_opener
from baton.node.telemetry import log_event

FORMAT = 3
CRASH_LOOP = 3
"""Unclean ends, the openings no longer ago than CRASH_WINDOW_S, after which the data itself is suspected."""
CRASH_WINDOW_S = 60.0
QUARANTINE = "quarantine-"

logger = logging.getLogger(__name__)


class Trust(Enum):
    """What the folder knows of its data."""

    EMPTY = "empty"  # there is none
    WHOLE = "whole"
    MIXED = "mixed"  # of this tier, but from before a crash of the machine


@dataclass(frozen=True, slots=True)
class Contents:
    """What the data must be to be used."""

    backend: str
    namespace: bytes  # 32 bytes
    block_bytes: int
    quota_bytes: int
    """Data that was made for a smaller quota is used too."""


@dataclass(frozen=True, slots=True)
class Boot:
    """This run of the machine: its id ("" if unknown: no data of an unclean end is trusted), and its age in seconds."""

    boot_id: str
    age_s: float

    @classmethod
    def now(cls) -> Boot:
        clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return cls(kernel_boot_id(), time.clock_gettime(clock))


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """state.json."""

    format: int
    backend: str
    namespace: str
    block_bytes: int
    quota_bytes: int
    boot_id: str
    clean: bool
    opened_at_s: list[float]  # unclean openings in this run of the machine, the latest last


class TierFolder:
    """Owned from `__init__` to `close`."""

    def __init__(self, path: Path, contents: Contents, boot: Boot) -> None:
        """Raises SettingsError if the folder cannot be made or written, or another process uses it."""
        self.data = path / "data"
        self._path = path
        self._contents = contents
        self._boot = boot
        self._begun = False
        self._lock_fd = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _lock(path / "lock")
            self.trust = self._judge()
            self._delete_quarantined()
            self.data.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self.close()
            raise SettingsError(f"cannot use {path} for blocks: {error}") from error

    @classmethod
    @contextmanager
    def opening(cls, path: Path, contents: Contents, boot: Boot) -> Iterator[TierFolder]:
        """For what is done to open the data: if that fails, the folder is closed. Raises SettingsError as well."""
        folder = cls(path, contents, boot)
        try:
            yield folder
        except BaseException as error:
            folder._forget_beginning()
            folder.close()
            if isinstance(error, OSError | RecordFault | StorageBroken | WriteFault):
                raise SettingsError(f"cannot keep blocks in {path}: {error}") from error
            raise

    def begin(self) -> None:
        """The storage is about to change its data. Raises SettingsError if that cannot be noted."""
        recent = self._openings[-CRASH_LOOP:]
        try:
            self._write_state(clean=False, opened_at_s=[*recent, self._boot.age_s])
            self._begun = True
        except OSError as error:
            raise SettingsError(f"cannot write in {self._path}: {error}") from error

    def _forget_beginning(self) -> None:
        """The data could not be opened, as on a full disk, and no process died of it: that is no crash, nor has the
        data become that of a larger quota."""
        if not self._begun:
            return
        quota_bytes = self._contents.quota_bytes if self._before is None else self._before.quota_bytes
        with suppress(OSError):
            self._write_state(clean=False, opened_at_s=self._openings, quota_bytes=quota_bytes)

    def end(self) -> None:
        """The data is synced and no longer changed. Raises WriteFault if that cannot be noted."""
        try:
            self._write_state(clean=True, opened_at_s=[])
        except OSError as error:
            raise WriteFault(Refusal.IO_ERROR, str(error)) from error

    def discard(self, cause: str) -> None:
        """Set aside all data, and make an empty folder for new; if the disk forbids it, the next use will show it."""
        log_event(logger, "tier_data_discarded", level=logging.WARNING, path=str(self._path), cause=cause)
        try:
            self._rename_data()
            self._delete_quarantined()
            self.data.mkdir(mode=0o700)
        except OSError as error:
            log_event(logger, "tier_discard_failed", level=logging.ERROR, path=str(self._path), cause=str(error))
        self.trust = Trust.EMPTY

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -- inside

    def _judge(self) -> Trust:
        self._openings: list[float] = []
        self._before: _State | None = None  # of data that is kept
        if not self.data.is_dir() or not any(self.data.iterdir()):
            return Trust.EMPTY
        state = self._read_state()
        cause = self._mismatch(state)
        if state is None or cause:
            log_event(logger, "tier_data_discarded", level=logging.WARNING, path=str(self._path), cause=cause)
            self._rename_data()
            return Trust.EMPTY
        self._before = state
        if state.clean:
            return Trust.WHOLE
        if not self._boot.boot_id or state.boot_id != self._boot.boot_id:
            return Trust.MIXED
        self._openings = [s for s in state.opened_at_s if self._boot.age_s - CRASH_WINDOW_S <= s <= self._boot.age_s]
        if len(self._openings) >= CRASH_LOOP:
            log_event(logger, "tier_data_discarded", level=logging.WARNING, path=str(self._path), cause="crash loop")
            self._openings, self._before = [], None
            self._rename_data()
            return Trust.EMPTY
        return Trust.WHOLE

    def _mismatch(self, state: _State | None) -> str:
        """Why this is not the data of this tier; empty if it is."""
        want = self._contents
        if state is None:
            return "no state"
        if state.format != FORMAT or state.backend != want.backend:
            return f"data of {state.backend[:32]}, format {state.format}"
        if state.namespace != want.namespace.hex():
            return "data of another namespace"
        if state.block_bytes != want.block_bytes:
            return f"blocks of {state.block_bytes} bytes"
        if state.quota_bytes > want.quota_bytes:
            return f"data for a quota of {state.quota_bytes} bytes"
        return ""

    def _read_state(self) -> _State | None:
        """None if there is none that can be understood."""
        try:
            return msgspec.json.decode((self._path / "state.json").read_bytes(), type=_State)
        except (OSError, *DECODE_ERRORS):
            return None

    def _write_state(self, *, clean: bool, opened_at_s: list[float], quota_bytes: int | None = None) -> None:
        state = _State(
            format=FORMAT,
            backend=self._contents.backend,
            namespace=self._contents.namespace.hex(),
            block_bytes=self._contents.block_bytes,
            quota_bytes=quota_bytes or self._contents.quota_bytes,
            boot_id=self._boot.boot_id,
            clean=clean,
            opened_at_s=opened_at_s,
        )
        new = self._path / "state.json.new"
        with open(new, "wb", opener=private_opener) as file:
            file.write(msgspec.json.encode(state))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path / "state.json")
        _sync_folder(self._path)

    def _rename_data(self) -> None:
        number = 0
        while (self._path / f"{QUARANTINE}{number}").exists():
            number += 1
        self.data.rename(self._path / f"{QUARANTINE}{number}")
        _sync_folder(self._path)

    def _delete_quarantined(self) -> None:
        """Also what an earlier process could not."""
        for folder in self._path.glob(QUARANTINE + "*"):
            shutil.rmtree(folder)


def _lock(path: Path) -> int:
    """A file descriptor that holds the lock; the kernel ends it with the process, however that dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SettingsError(f"{path.parent} is used by another process") from None
    except OSError:
        os.close(fd)
        raise
    return fd


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
