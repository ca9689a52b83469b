"""What the tests of the tiers share: keys and blocks by number, a clock to turn, a listener that complains."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.kvtransfer.store.disk.lmdb_environment import PAGE_BYTES
from baton.kvtransfer.store.disk.lmdb_records import LmdbGeometry, lmdb_tier
from baton.kvtransfer.store.disk.slab_records import SPARE_SLOTS, num_slots_of, slab_tier
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.node.errors import SettingsError

ROOT = Path(__file__).resolve().parents[4]
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


def digest(number: int) -> bytes:
    """What its owner calls the digest of block `number`; a tier does not know how it is made."""
    return hashlib.shake_128(b"digest %d" % number).digest(16)


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Changes:
    """Records a tier's reports of its blocks."""

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
    """Get block `number`; a hit must be bit for bit what was put, and so must its digest."""
    into = memoryview(bytearray(tier.block_bytes))
    hit = tier.get(key(number), into)
    if hit is not None:
        assert into == block(number, tier.block_bytes) and hit == digest(number)
    return hit is not None


def put(tier: RecordTier, number: int) -> bool:
    return tier.put(key(number), block(number, tier.block_bytes), digest(number))


def fill(tier: RecordTier, numbers: Iterable[int]) -> None:
    for number in numbers:
        assert put(tier, number), number


Opener = Callable[..., RecordTier]


@dataclass(frozen=True)
class Disk:
    """One kind of tier on disk, for BLOCK_BYTES."""

    open: Opener  # path, namespace, block_bytes, quota_bytes, ...
    quota: Callable[[int], int]
    blocks: str  # the file of the blocks, below the tier's folder
    index: str  # the LMDB file


DISKS = {
    "lmdb": Disk(lmdb_tier, lmdb_quota, "data/data.mdb", "data/data.mdb"),
    "slab": Disk(slab_tier, slab_quota, "data/slots", "data/index/data.mdb"),
}


def open_disk(kind: str, path: Path, num_blocks: int, **options: Any) -> RecordTier:
    """A tier for `num_blocks` or one more."""
    return DISKS[kind].open(path, NAMESPACE, BLOCK_BYTES, DISKS[kind].quota(num_blocks), **options)


def held(tier: RecordTier) -> set[int]:
    """Which of the first hundred blocks are read, bit for bit."""
    return {number for number in range(100) if read(tier, number)}


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Runs `code` in a process of its own, after the imports of these checks."""
    head = "import sys\nfrom pathlib import Path\nfrom baton.tests.unit.kvtransfer.store.disk.tier_checks import *\n"
    command = [sys.executable, "-P", "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_child(code: str, *arguments: object) -> str:
    """What it printed; fails unless it ends well."""
    process = child(code, *arguments)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, process.returncode
    return out


def kill_after_filling(kind: str, path: Path, num_blocks: int, boot_id: str) -> None:
    """Fill a tier in a process that then dies by SIGKILL, in that run of the machine."""
    process = child(
        """
        import os, signal
        from baton.kvtransfer.store.disk.folder import Boot
        kind, path, num_blocks, boot_id = sys.argv[1:]
        tier = open_disk(kind, Path(path), int(num_blocks), boot=lambda: Boot(boot_id, 1.0))
        fill(tier, range(int(num_blocks)))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        *(kind, path, num_blocks, boot_id),
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
