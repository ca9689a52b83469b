"""Host memory that a process of the same host can map: both the owner's side and the reader's. No torch, no blocks.

The memory is an unnamed file (memfd_create(2)). Another process opens it through /proc/<pid>/fd/<fd>, so there is no
name to clean up: when the last process that maps it is gone, also by SIGKILL, the memory is gone. The file is sealed
against a change of size, so that no end can make the other fault by cutting it. Behind the payload is one page that
begins with a random nonce: a reader that finds it has opened the file that was meant, not another one after a pid or
a file descriptor was used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
from typing import NamedTuple, Protocol

from baton.node.errors import InvariantBroken, PeerLost

NONCE_BYTES = 16
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW of fcntl(2)


class SharedFile(NamedTuple):
    """What a process of the same host needs, besides the pid, to open the memory."""

    fd: int
    size_bytes: int
    """Of the file: the payload, rounded up to pages, and the page of the nonce."""
    nonce: bytes


class BlockMemory(Protocol):
    """The bytes of the blocks of one pool, as the data planes see them."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def num_units(self) -> int:
        """Equal parts of a block, which are summed up one by one."""
        ...

    def block(self, index: int) -> memoryview:
        """The writable bytes of one block, [block_bytes]."""
        ...


class SharedBlockMemory(BlockMemory, Protocol):
    """A BlockMemory that others on this host may be able to map; block i lies at i * block_bytes of the file."""

    @property
    def shared(self) -> SharedFile | None: ...


class HostMemory:
    """Zeroed memory of `num_blocks` blocks in this process; `shared` is None where the platform has no memfd."""

    def __init__(self, num_blocks: int, block_bytes: int, num_units: int = 1) -> None:
        if num_blocks < 1 or block_bytes < 1 or block_bytes % num_units:
            raise ValueError(f"memory for {num_blocks} blocks of {num_units} units in {block_bytes} bytes")
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.num_units = num_units
        payload_bytes = num_blocks * block_bytes
        size_bytes = -(-payload_bytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
        self.shared = _create(size_bytes)
        self._map = mmap.mmap(self.shared.fd if self.shared else -1, size_bytes)
        if self.shared:
            start = size_bytes - mmap.PAGESIZE
            self._map[start : start + NONCE_BYTES] = self.shared.nonce
        self._view: memoryview | None = memoryview(self._map)[:payload_bytes]

    @property
    def view(self) -> memoryview:
        """All blocks, [num_blocks * block_bytes], writable. A view keeps the memory mapped."""
        if self._view is None:
            raise InvariantBroken("memory is used after it was closed")
        return self._view

    def block(self, index: int) -> memoryview:
        """The writable bytes of one block, [block_bytes]."""
        if not 0 <= index < self.num_blocks:
            raise InvariantBroken(f"block {index} of a pool of {self.num_blocks}")
        return self.view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def unit_parts(self, index: int) -> list[list[memoryview]]:
        """The writable bytes of each unit of one block, in one part each: see copies.UnitBytes."""
        block, unit_bytes = self.block(index), self.block_bytes // self.num_units
        return [[block[start : start + unit_bytes]] for start in range(0, self.block_bytes, unit_bytes)]

    def close(self) -> None:
        """Give the memory back: at once, or with the last view of it that someone still holds. May be repeated."""
        if self._view is None:
            return
        self._view = None
        if self.shared:
            os.close(self.shared.fd)
        _unmap(self._map)


class SharedReader:
    """A mapping of another process's HostMemory: read-only, unless it is `writable`."""

    def __init__(self, pid: int, shared: SharedFile, *, writable: bool = False) -> None:
        """Raises PeerLost if the process, the file, its size, its seals or its nonce are not what was described."""
        fd = _open(pid, shared, writable)
        try:
            self._map = mmap.mmap(fd, shared.size_bytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise PeerLost(f"cannot map the memory of process {pid}: {error}") from error
        finally:
            os.close(fd)
        start = shared.size_bytes - mmap.PAGESIZE
        self._view: memoryview | None = memoryview(self._map)[:start]
        if not secrets.compare_digest(self._map[start : start + NONCE_BYTES], shared.nonce):
            self.close()
            raise PeerLost(f"the memory of process {pid} is not the one described: its nonce differs")

    @property
    def view(self) -> memoryview:
        """All bytes; what views them keeps the memory mapped."""
        if self._view is None:
            raise InvariantBroken("a mapping is used after it was closed")
        return self._view

    def block(self, index: int, block_bytes: int) -> memoryview:
        """The bytes of one block, read-only; what views them keeps the memory mapped.

        Raises PeerLost if the memory is too small to have this block.
        """
        return self.span(index * block_bytes, block_bytes)

    def span(self, offset: int, size_bytes: int) -> memoryview:
        """The bytes [offset, offset + size_bytes), as `block` gives them, writable if the mapping is."""
        view = self.view
        if offset < 0 or size_bytes < 1 or offset + size_bytes > len(view):
            raise PeerLost(f"no bytes from {offset} to {offset + size_bytes} in {len(view)} of the peer's memory")
        return view[offset : offset + size_bytes]

    def close(self) -> None:
        """Unmap: at once, or with the last view of it that someone still holds. May be repeated."""
        if self._view is not None:
            self._view = None
            _unmap(self._map)


def _create(size_bytes: int) -> SharedFile | None:
    if not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return SharedFile(fd, size_bytes, secrets.token_bytes(NONCE_BYTES))


def _open(pid: int, shared: SharedFile, writable: bool) -> int:
    """A file descriptor for another process's memory, checked for all but the nonce; the caller closes it."""
    if pid < 1 or shared.fd < 0 or shared.size_bytes < 2 * mmap.PAGESIZE or shared.size_bytes % mmap.PAGESIZE:
        raise PeerLost(f"no such memory: pid {pid}, fd {shared.fd}, {shared.size_bytes} bytes")
    path = f"/proc/{pid}/fd/{shared.fd}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe or a device could block or act
            raise PeerLost(f"{path} is no memory")
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PeerLost(f"cannot open the memory of process {pid}: {error}") from error
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        size_bytes = os.fstat(fd).st_size
    except OSError as error:
        os.close(fd)
        raise PeerLost(f"{path} is no sealed memory: {error}") from error
    if not sealed or size_bytes != shared.size_bytes:
        os.close(fd)
        raise PeerLost(f"{path} has {size_bytes} bytes (sealed: {sealed}), {shared.size_bytes} were described")
    return fd


def _unmap(mapping: mmap.mmap) -> None:
    """Close now if there is no view; else the mapping goes with the last view."""
    with contextlib.suppress(BufferError):
        mapping.close()
