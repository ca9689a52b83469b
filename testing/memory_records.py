"""Block records in memory, for tests and trials without a disk. Nothing survives a restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from baton.kvtransfer.store.disk.base import Changed, Miss, ignore_change
from baton.kvtransfer.store.disk.records import Block, RecordFault
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.node.errors import SettingsError


class MemoryRecords:
    """Holds a copy of each block under its key. Copies never change, so reads verify nothing; `on_check` is called by
    `check`."""

    def __init__(self, quota_bytes: int, block_bytes: int, on_check: Callable[[], None] = lambda: None) -> None:
        self.capacity_blocks = quota_bytes // block_bytes
        if self.capacity_blocks < 1:
            raise SettingsError(f"a quota of {quota_bytes} bytes holds no block of {block_bytes}")
        self.check = on_check
        self._blocks: dict[bytes, tuple[bytes, bytes]] = {}  # bytes and digest

    def load(self) -> list[tuple[bytes, int]]:
        return []

    def read(self, key: bytes, into: memoryview) -> bytes:
        block = self._blocks.get(key)
        if block is None:
            raise RecordFault(Miss.ABSENT)
        into.cast("B")[:], digest = block
        return digest

    def write(self, key: bytes, block: Block, tick: int, victims: Sequence[bytes], ticks: Mapping[bytes, int]) -> None:
        self.remove(victims)
        self._blocks[key] = (bytes(block.data), block.digest)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._blocks.pop(key, None)

    def note(self, ticks: Mapping[bytes, int]) -> None:
        """Does nothing: recency is only needed after a restart."""

    def close(self) -> None:
        self._blocks.clear()

    def abandon(self) -> None:
        self._blocks.clear()

    def discard(self) -> None:
        self._blocks.clear()


def memory_tier(
    quota_bytes: int,
    block_bytes: int,
    on_change: Changed = ignore_change,
    clock: Callable[[], float] = time.monotonic,
    on_check: Callable[[], None] = lambda: None,
) -> RecordTier:
    """A tier over `MemoryRecords` of at most `quota_bytes`."""
    return RecordTier(
        "memory", block_bytes, lambda: MemoryRecords(quota_bytes, block_bytes, on_check), on_change, clock
    )
