"""The file of --adapter-state: what names of adapters mean since they were changed, so that they outlive each proxy.

Proxies may share it. A lock beside it puts their changes in an order, and it is replaced whole, so that what is read is
always what one of them wrote. It knows no request and asks no worker.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from baton.node.errors import Overloaded, SettingsError
from baton.node.private_files import private_opener
from baton.node.telemetry import excerpt

FILE_NAME = ".baton-adapters.json"
"""Inside --adapter-root, unless --adapter-state says otherwise."""
VERSION = 1
MAX_CHANGES, MAX_BYTES = 10_000, 32 << 20
LOCK_TIMEOUT_S, LOCK_POLL_S = 10.0, 0.02

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Meta(min_length=1, max_length=8192)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
T = TypeVar("T")


class KeptAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was loaded under a name."""

    path: Text
    """As it was asked for."""
    folder: Text
    digest: Digest
    rank: Count
    size_bytes: Count
    created: Count


class NameChange(msgspec.Struct, frozen=True, kw_only=True):
    """What a name means instead of what --lora-modules say."""

    name: Text
    model: Text
    """The adapter's, by the first of its names: several may be served from one root."""
    replaces: Digest | None = None
    """The adapter that --lora-modules gave the name then. If they say another now, they are newer and count."""
    adapter: KeptAdapter | None = None
    """None: the name is gone."""


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    changes: Annotated[tuple[NameChange, ...], Meta(max_length=MAX_CHANGES)]


class AdapterState:
    """The file. Reading and writing wait for the disk; `locked` does so in threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        """Of the file that was read last: inode, size and time in ns; None: there was none."""

    @property
    def changed(self) -> bool:
        """Whether there is another file than the one that was read last."""
        try:
            return _mark(self.path.stat()) != self._seen
        except FileNotFoundError:
            return self._seen is not None
        except OSError:
            return False  # what is known counts until it can be read

    def check(self) -> None:
        """Raises SettingsError where changes could not be kept."""
        folder = self.path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise self._error(f"{folder} is no folder that this process can write in")
        self.read()

    def read(self) -> tuple[NameChange, ...]:
        """In the order in which the names were first changed. Raises SettingsError for a file that others can change,
        and for one of another form: changes that were lost in silence would be names that are not served."""
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                found = os.fstat(file.fileno())
                self._check_owner(found)
                content = _DECODER.decode(file.read(MAX_BYTES + 1))
        except FileNotFoundError:
            self._seen = None
            return ()
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._error(f"is not what a proxy wrote: {excerpt(error)}") from None
        if content.version != VERSION:
            raise self._error(f"has version {content.version}, this is {VERSION}")
        if len({(each.model, each.name) for each in content.changes}) < len(content.changes):
            raise self._error("has a name twice")
        self._seen = _mark(found)
        return content.changes

    def write(self, changes: Sequence[NameChange]) -> None:
        """Replace the file, for the holder of the lock. Raises SettingsError; then it is as it was or, where only its
        folder could not be synced, as given: never in between."""
        data = msgspec.json.format(msgspec.json.encode(_Content(version=VERSION, changes=tuple(changes))))
        if len(changes) > MAX_CHANGES or len(data) > MAX_BYTES:
            raise self._error(f"has no room for {len(changes)} names; at most {MAX_CHANGES}, in {MAX_BYTES} bytes")
        made = self._beside(".new")
        try:
            made.unlink(missing_ok=True)  # of a proxy that died
            with open(made, "xb", opener=private_opener) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            made.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._error(f"cannot be written: {error.strerror}") from None

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Inside it no other proxy changes the file. Raises Overloaded where one does for too long, and SettingsError
        where there can be no lock."""
        lock = _Lock(self._beside(".lock"))
        try:
            await self._take(lock)
            yield
        finally:
            await in_thread_to_its_end(lock.close)

    async def _take(self, lock: _Lock) -> None:
        try:
            await in_thread_to_its_end(lock.open)
            async with asyncio.timeout(LOCK_TIMEOUT_S):
                while not await in_thread_to_its_end(lock.take):
                    await asyncio.sleep(LOCK_POLL_S)
        except TimeoutError:
            raise Overloaded("another proxy changes the names of adapters; try again", status=503) from None
        except OSError as error:  # also of a file system without locks
            raise self._error(f"cannot be locked: {error.strerror}") from None

    def _check_owner(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise self._error("is not a regular file")
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise self._error(
                f"other users can change it (mode {stat.S_IMODE(found.st_mode):04o}, owner {found.st_uid}); "
                f"read it, then `chmod 600` it or delete it"
            )
        if found.st_size > MAX_BYTES:
            raise self._error(f"has {found.st_size} bytes, more than {MAX_BYTES}")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(self.path.name + ending)

    def _error(self, what: str) -> SettingsError:
        return SettingsError(f"--adapter-state {self.path}: {what}")


class _Lock:
    """A lock on a file that is made for it. On a file system of the network each call may wait."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """Whether it is held now. Raises OSError where the file system has no locks."""
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Unlock it, as the end of the process does."""
        if self._fd is not None:
            os.close(self._fd)


async def in_thread_to_its_end(work: Callable[[], T]) -> T:
    """What `work` returns, run in a thread. Also where this task is cancelled meanwhile the thread goes on, and this
    waits for it: what it uses stays held as long."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


_DECODER = msgspec.json.Decoder(_Content)


def _mark(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
