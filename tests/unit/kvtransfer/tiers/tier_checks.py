"""What the tests of the tiers share: keys and blocks by number, a clock to turn, a listener that complains."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kvtransfer.tiers.lmdb_environment import PAGE_BYTES
from kvtransfer.tiers.lmdb_records import LmdbGeometry
from kvtransfer.tiers.slab_records import SPARE_SLOTS, num_slots_of
from kvtransfer.tiers.tier import RecordTier
from node.errors import SettingsError

BLOCK_BYTES = 8192
NAMESPACE = bytes(range(32))


def lmdb_quota(num_blocks: int, block_bytes: int = BLOCK_BYTES) -> int:
    """The smallest quota (in pages) that holds so many blocks."""
    return _least(lambda quota_bytes: LmdbGeometry.of(quota_bytes, block_bytes).capacity_blocks, num_blocks)


def slab_quota(num_blocks: int, block_bytes: int = BLOCK_BYTES) -> int:
    return _least(lambda quota_bytes: num_slots_of(quota_bytes, block_bytes) - SPARE_SLOTS, num_blocks)


def _least(capacity_of: Callable[[int], int], num_blocks: int) -> int:
    for quota_bytes in itertools.count(PAGE_BYTES, PAGE_BYTES):
        try:
            if capacity_of(quota_bytes) >= num_blocks:
                return quota_bytes
        except SettingsError:
            continue
    raise AssertionError


def refuse_direct(path: Path, flags: int, mode: int) -> int:
    """As open(2) on a file system without direct I/O."""
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return os.open(path, flags, mode)


def key(number: int) -> bytes:
    """The key of block `number`: 32 bytes."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def block(number: int, size_bytes: int = BLOCK_BYTES) -> memoryview:
    """The bytes of block `number`: unlike those of any other."""
    return memoryview(hashlib.shake_128(number.to_bytes(8, "little")).digest(size_bytes))


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Changes:
    """What a tier told of its blocks."""

    seen: list[tuple[bytes, bool]] = field(default_factory=list)

    def __call__(self, changed: bytes, held: bool) -> None:
        self.seen.append((changed, held))

    def held(self) -> set[bytes]:
        """Fails if something came twice, or left without having come."""
        held: set[bytes] = set()
        for changed, came in self.seen:
            assert (changed in held) is not came
            (held.add if came else held.remove)(changed)
        return held


def read(tier: RecordTier, number: int) -> bool:
    """Get block `number`; a hit must be bit for bit what was put."""
    into = memoryview(bytearray(tier.block_bytes))
    hit = tier.get(key(number), into)
    if hit:
        assert into == block(number, tier.block_bytes)
    return hit


def fill(tier: RecordTier, numbers: Iterable[int]) -> None:
    for number in numbers:
        assert tier.put(key(number), block(number, tier.block_bytes)), number


Opener = Callable[..., RecordTier]
