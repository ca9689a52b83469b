"""GB/s of the tiers on disk and of plain files, side by side in one run, through the interface that a store uses.

For each size of block and each round, every kind in turn: put (with the final sync), then all blocks in random order
after the files were dropped from the page cache (cold), then once more (warm). Buffers lie at page addresses, as the
slots of a RAM arena do; each block's content differs and each hit is verified by the tier. `file` is one preallocated
file with O_DIRECT, without header, digest or index: what the disk gives to Python. A row has the median and the best
of the rounds in GB/s (1e9), and the 99th percentile of a call in ms over all rounds. Before them a row of `memcpy`
between two pieces of shared memory, and of the same as a worker on CPU does it between its pool and a store's arena,
with the digest of each block. One JSON line a row on standard output.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.statistics import percentile
from baton.kvtransfer.blocks.copies import HostCopies, Pair
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.store.disk.lmdb_records import lmdb_tier
from baton.kvtransfer.store.disk.slab_records import slab_tier
from baton.kvtransfer.store.disk.slot_file import PAGE_BYTES, SlotFile

KIB, MIB = 1 << 10, 1 << 20
NAMESPACE = bytes(32)
ARENA_MIB = 256
DIGEST = bytes(16)
"""A tier only keeps it."""


class BlockFile(Protocol):
    """What is measured: a disk tier, or a plain file."""

    def put(self, key: bytes, data: memoryview, digest: bytes) -> bool: ...
    def get(self, key: bytes, into: memoryview) -> bytes | None: ...
    def close(self) -> None: ...


class PlainFile:
    """Blocks at their place in one file; the key says where."""

    def __init__(self, path: Path, block_bytes: int, quota_bytes: int) -> None:
        path.mkdir(exist_ok=True)
        self._block_bytes = block_bytes
        self._fd = os.open(path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, quota_bytes)

    def put(self, key: bytes, data: memoryview, digest: bytes) -> bool:
        return os.pwrite(self._fd, data, self._at(key)) == data.nbytes

    def get(self, key: bytes, into: memoryview) -> bytes | None:
        return DIGEST if os.preadv(self._fd, [into], self._at(key)) == into.nbytes else None

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def _at(self, key: bytes) -> int:
        return int.from_bytes(key[:8], "little") * self._block_bytes


def buffered(path: Path, flags: int, mode: int) -> int:
    """Opens as if the file system had no direct I/O."""
    return os.open(path, flags & ~os.O_DIRECT, mode)


KINDS: dict[str, Callable[[Path, int, int], BlockFile]] = {
    "file": PlainFile,
    "lmdb": lambda path, size, quota: lmdb_tier(path, NAMESPACE, size, quota),
    "slab": lambda path, size, quota: slab_tier(path, NAMESPACE, size, quota),
    "slab-buffered": lambda path, size, quota: slab_tier(path, NAMESPACE, size, quota, open_file=buffered),
}


class TierTimes:
    """Of one kind, size and operation, over the rounds."""

    def __init__(self) -> None:
        self.gb_s: list[float] = []
        self.call_s: list[float] = []

    def add(self, size_bytes: int, duration_s: float, call_s: list[float]) -> None:
        self.gb_s.append(size_bytes / duration_s / 1e9)
        self.call_s += call_s

    def values(self) -> dict[str, float]:
        median, best, p99_s = statistics.median(self.gb_s), max(self.gb_s), percentile(self.call_s, 99)
        return {"gb_s": round(median, 2), "best_gb_s": round(best, 2), "p99_ms": round(p99_s * 1e3, 2)}


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "little") * 4


def aligned(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))


def write(store: BlockFile, count: int, block_bytes: int, row: TierTimes) -> None:
    data = aligned(block_bytes)
    data[:] = random.Random(block_bytes).randbytes(block_bytes)
    call_s = []
    begin_s = time.perf_counter()
    for number in range(count):
        data[:8] = number.to_bytes(8, "little")
        call_begin_s = time.perf_counter()
        assert store.put(key_of(number), data, DIGEST), "a put was refused"
        call_s.append(time.perf_counter() - call_begin_s)
    store.close()
    row.add(count * block_bytes, time.perf_counter() - begin_s, call_s)


def read(store: BlockFile, numbers: list[int], block_bytes: int, threads: int, row: TierTimes) -> None:
    def work(part: list[int]) -> list[float]:
        into = aligned(block_bytes)
        call_s = []
        for number in part:
            begin_s = time.perf_counter()
            assert store.get(key_of(number), into) is not None, "a block is missing"
            call_s.append(time.perf_counter() - begin_s)
            assert int.from_bytes(into[:8], "little") == number
        return call_s

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(abs, range(threads)))  # its threads exist
        begin_s = time.perf_counter()
        parts = list(pool.map(work, [numbers[start::threads] for start in range(threads)]))
        duration_s = time.perf_counter() - begin_s
    row.add(len(numbers) * block_bytes, duration_s, [each for part in parts for each in part])


def forget_cached(folder: Path) -> None:
    """Drop all files from the page cache, after writing them out."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(kind: str, folder: Path, block_bytes: int, count: int, threads: int, rows: dict[str, TierTimes]) -> None:
    """One round of one kind."""
    quota_bytes = int(count * (block_bytes + PAGE_BYTES * 2) * 1.25) + 4 * MIB
    open_store = KINDS[kind]
    write(open_store(folder, block_bytes, quota_bytes), count, block_bytes, rows["write"])
    forget_cached(folder)
    store = open_store(folder, block_bytes, quota_bytes)
    numbers = list(range(count))
    random.Random(1).shuffle(numbers)
    read(store, numbers, block_bytes, threads, rows["read cold"])
    read(store, numbers, block_bytes, threads, rows["read warm"])
    store.close()


def has_direct_io(folder: Path) -> bool:
    slots = SlotFile(folder / "probe", 1, PAGE_BYTES)
    slots.close()
    return slots.direct


def main(argv: Sequence[str]) -> int:
    parser = new_parser("tiers", __doc__)
    parser.add_argument("--path", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="what to measure")
    parser.add_argument("--sizes-kib", nargs="+", type=int, default=[256, 2048, 8192], help="of a block")
    parser.add_argument("--total-mib", type=int, default=1024, help="MiB of blocks a round")
    parser.add_argument("--rounds", type=int, default=3, help="times that each kind is measured")
    parser.add_argument("--threads", type=int, default=2, help="threads that read; one writes")
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    folder = Path(tempfile.mkdtemp(prefix="bench-tiers-", dir=options.path))
    try:
        load = round(os.getloadavg()[0], 1)
        about = {"cpus": os.cpu_count(), "kernel": platform.release(), "load_average": load}
        lines.write(**about, direct_io=has_direct_io(folder), threads=options.threads, total_mib=options.total_mib)
        for size_kib in options.sizes_kib:
            measure_arena(size_kib, options, lines)
        for size_kib in options.sizes_kib:
            measure_size(folder, size_kib, options, lines)
    finally:
        shutil.rmtree(folder)
    return 0


def measure_arena(size_kib: int, options: argparse.Namespace, lines: JsonLines) -> None:
    """Pool to arena and back, beside memcpy, one after the other in each round."""
    size_bytes, count = size_kib * KIB, max(2, ARENA_MIB * KIB // size_kib)
    pool, arena = HostMemory(count, size_bytes), HostMemory(count, size_bytes)
    copies = HostCopies(pool)
    pairs = [Pair(number, arena.block(number)) for number in range(count)]
    plain = [(np.frombuffer(pool.block(n), np.uint8), np.frombuffer(arena.block(n), np.uint8)) for n in range(count)]

    def move(begin: Callable[[Sequence[Pair]], int]) -> None:
        for pair in pairs:
            copies.ended(begin([pair]))

    def copy_plain() -> None:
        for source, target in plain:
            np.copyto(target, source)

    ways = {
        "memcpy": copy_plain,
        "to arena": lambda: move(copies.begin_save),
        "to pool": lambda: move(copies.begin_load),
    }
    rows = {name: TierTimes() for name in ways}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            begin_s = time.perf_counter()
            way()
            rows[name].add(count * size_bytes, time.perf_counter() - begin_s, [])
    for name, row in rows.items():
        found = statistics.median(row.gb_s[1:])  # pages come to be in the first
        lines.write(kind="arena", size_kib=size_kib, operation=name, gb_s=round(found, 2))


def measure_size(folder: Path, size_kib: int, options: argparse.Namespace, lines: JsonLines) -> None:
    rows = {kind: {name: TierTimes() for name in ("write", "read cold", "read warm")} for kind in options.kinds}
    for turn in range(options.rounds):
        for kind in options.kinds if turn % 2 == 0 else reversed(options.kinds):
            place = folder / "round"
            count = options.total_mib * KIB // size_kib
            measure(kind, place, size_kib * KIB, count, options.threads, rows[kind])
            shutil.rmtree(place)
    for kind, by_name in rows.items():
        for name, row in by_name.items():
            lines.write(kind=kind, size_kib=size_kib, operation=name, **row.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
