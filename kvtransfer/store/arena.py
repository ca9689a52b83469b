"""The bytes of the RAM arena: in the store, which owns them, and in a worker, which maps them and copies (copies.py).

A hit is one copy: from the arena into the worker's pool. The reader hashes what it has got and compares with the digest
that the writer sent to the store, so later writes to the arena do not matter: wrong bytes are a miss.
"""

from __future__ import annotations

import os

from baton.kvtransfer.blocks.memory import HostMemory, SharedFile, SharedReader
from baton.node.errors import PeerLost, SettingsError
from baton.node.host import host_identity
from baton.node.messages.store import Attached

REGIONS = 16
"""So many parts can go to different sizes of blocks. A block must fit into one."""
PAGE_BYTES = 4096


class Arena:
    """The store's end: memory of `ram_bytes` rounded down to REGIONS regions of whole pages."""

    def __init__(self, ram_bytes: int) -> None:
        """Raises SettingsError where no other process could map the memory."""
        self.num_regions = REGIONS
        self.region_bytes = ram_bytes // REGIONS // PAGE_BYTES * PAGE_BYTES
        if self.region_bytes < 1:
            raise SettingsError(f"--ram-gib: {ram_bytes} bytes are less than {REGIONS} pages")
        self.size_bytes = self.num_regions * self.region_bytes
        self._memory = HostMemory(REGIONS, self.region_bytes)
        if self._memory.shared is None:
            raise SettingsError("this platform has no memory that several processes can map (memfd_create)")
        self.shared: SharedFile = self._memory.shared

    def span(self, offset: int, size_bytes: int) -> memoryview:
        """The writable bytes [offset, offset + size_bytes)."""
        assert offset >= 0 and offset + size_bytes <= self.size_bytes, (offset, size_bytes)
        return self._memory.view[offset : offset + size_bytes]

    def describe(self, store: str, lease_s: float) -> Attached:
        """What a worker of this host needs to map it."""
        return Attached(
            store=store,
            host=host_identity(),
            pid=os.getpid(),
            fd=self.shared.fd,
            size_bytes=self.shared.size_bytes,
            nonce=self.shared.nonce,
            lease_s=lease_s,
        )

    def close(self) -> None:
        self._memory.close()


def map_arena(attached: Attached) -> SharedReader:
    """A worker's end, writable. Raises PeerLost if the store is not on this host or its memory cannot be mapped."""
    if attached.host != host_identity():
        raise PeerLost("the store runs on another host: its memory cannot be mapped here")
    shared = SharedFile(attached.fd, attached.size_bytes, attached.nonce)
    return SharedReader(attached.pid, shared, writable=True)
