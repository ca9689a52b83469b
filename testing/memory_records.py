"""Records in memory: for tests, and for what should be tried without a disk. A restart finds nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from baton.kvtransfer.store.disk.base import Changed, Miss, ignore_change
from baton.kvtransfer.store.disk.records import Block, RecordFault
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.node.errors import SettingsError


class MemoryRecords:
    """Copies under their key. They are written once and never changed, so there is nothing to verify."""

    def __init__(self, quota_bytes: int, block_bytes: int) -> None:
        self.capacity_blocks = quota_bytes // block_bytes
        if self.capacity_blocks < 1:
            raise SettingsError(f"a quota of {quota_bytes} bytes holds no block of {block_bytes}")
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
        """There is no restart that would want them."""

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
) -> RecordTier:
    """A tier in memory that never holds more than `quota_bytes` of blocks."""
    return RecordTier("memory", block_bytes, lambda: MemoryRecords(quota_bytes, block_bytes), on_change, clock)
