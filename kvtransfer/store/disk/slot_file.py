"""A preallocated file of uniform slots, past the page cache where the file system allows it (O_DIRECT).

    slot     header, 4 KiB (record.py, then zeros) | block, padded with zeros to a multiple of 4 KiB

Direct I/O moves whole pages between the disk and memory at page addresses. A caller's buffer that fits is used as it
is; any other goes through a buffer of ours. Sources: open(2), "O_DIRECT"; preadv(2).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from baton.kvtransfer.store.disk.allocate import allocate
from baton.kvtransfer.store.disk.base import Miss, Refusal
from baton.kvtransfer.store.disk.file_watch import FileWatch
from baton.kvtransfer.store.disk.record import HEADER_BYTES
from baton.kvtransfer.store.disk.records import RecordFault, WriteFault

PAGE_BYTES = 4096
OpenFile = Callable[[Path, int, int], int]
"""As os.open: path, flags, mode to file descriptor."""


def slot_bytes(block_bytes: int) -> int:
    return PAGE_BYTES + _padded(block_bytes)


class SlotFile:
    """Reads and writes of different slots may run beside each other. Keeping slots apart is the caller's part.

    Both raise StorageBroken where the file is gone, replaced or cut short.
    """

    def __init__(self, path: Path, num_slots: int, block_bytes: int, open_file: OpenFile = os.open) -> None:
        """Raises OSError if the file cannot be opened, or the disk has no room for all of it."""
        self._block_bytes = block_bytes
        self._slot_bytes = slot_bytes(block_bytes)
        self._buffers: list[memoryview] = []  # [slot_bytes] each, at page addresses; as many as were in use at once
        self._fd, self.direct = _open(path, open_file)
        try:
            allocate(self._fd, num_slots * self._slot_bytes)
            self._watch = FileWatch(path)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, slot: int, into: memoryview) -> bytes:
        """Fill `into` with the block, and return the header. RecordFault."""
        buffer = self._buffers.pop() if self._buffers else _new_buffer(self._slot_bytes)
        try:
            if self._is_aligned(into):
                self._read(slot, [buffer[:PAGE_BYTES], into])
            else:
                self._read(slot, [buffer])
                _copy(into, buffer[PAGE_BYTES : PAGE_BYTES + self._block_bytes])
            return bytes(buffer[:HEADER_BYTES])
        finally:
            self._buffers.append(buffer)

    def read_header(self, slot: int) -> bytes:
        """RecordFault."""
        buffer = self._buffers.pop() if self._buffers else _new_buffer(self._slot_bytes)
        try:
            self._read(slot, [buffer[:PAGE_BYTES]])
            return bytes(buffer[:HEADER_BYTES])
        finally:
            self._buffers.append(buffer)

    def write(self, slot: int, header: bytes, data: memoryview) -> None:
        """WriteFault: the slot then holds anything."""
        buffer = self._buffers.pop() if self._buffers else _new_buffer(self._slot_bytes)
        try:
            buffer[:PAGE_BYTES] = header.ljust(PAGE_BYTES, b"\0")
            if self._is_aligned(data):
                self._write(slot, [buffer[:PAGE_BYTES], data])
            else:
                _copy(buffer[PAGE_BYTES : PAGE_BYTES + self._block_bytes], data)
                buffer[PAGE_BYTES + self._block_bytes :] = bytes(self._slot_bytes - PAGE_BYTES - self._block_bytes)
                self._write(slot, [buffer])
        finally:
            self._buffers.append(buffer)

    def check(self) -> None:
        """Raises StorageBroken if the file is gone, replaced or cut short."""
        self._watch.check()

    def sync(self) -> None:
        """WriteFault."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise WriteFault(Refusal.IO_ERROR, str(error)) from error

    def close(self) -> None:
        self._watch.close()
        os.close(self._fd)

    def _read(self, slot: int, parts: list[memoryview]) -> None:
        self.check()
        try:
            num_bytes = os.preadv(self._fd, parts, slot * self._slot_bytes)
        except OSError as error:
            raise RecordFault(Miss.IO_ERROR) from error
        if num_bytes < sum(part.nbytes for part in parts):
            raise RecordFault(Miss.TRUNCATED)

    def _write(self, slot: int, parts: list[memoryview]) -> None:
        self.check()
        try:
            num_bytes = os.pwritev(self._fd, parts, slot * self._slot_bytes)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise WriteFault(Refusal.FULL if full else Refusal.IO_ERROR, str(error)) from error
        if num_bytes < sum(part.nbytes for part in parts):
            raise WriteFault(Refusal.FULL, f"{num_bytes} bytes were written")

    def _is_aligned(self, buffer: memoryview) -> bool:
        return self._block_bytes % PAGE_BYTES == 0 and _array(buffer).ctypes.data % PAGE_BYTES == 0


def _open(path: Path, open_file: OpenFile) -> tuple[int, bool]:
    """A file descriptor, and whether it is direct. Some file systems refuse that when opening, others when reading."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = open_file(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return open_file(path, flags, 0o600), False
    try:
        os.preadv(fd, [_new_buffer(PAGE_BYTES)], 0)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EINVAL:
            raise
        return open_file(path, flags, 0o600), False
    return fd, True


def _new_buffer(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _array(buffer: memoryview) -> np.ndarray:
    return np.frombuffer(buffer, dtype=np.uint8)


def _copy(into: memoryview, source: memoryview) -> None:
    np.copyto(_array(into), _array(source))
