"""What the tests of the tiers share: keys and blocks by number, a clock to turn, a listener that finds contradictions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvtransfer.tiers.tier import RecordTier

BLOCK_BYTES = 8192


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
