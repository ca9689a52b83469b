"""kvtransfer.store.disk_thread over tiers in memory: writes at second use, loads, and every fault of a tier a miss."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from baton.kvtransfer.blocks.checksum import xxh3
from baton.kvtransfer.store.arena_index import Key
from baton.kvtransfer.store.disk.base import Tier
from baton.kvtransfer.store.disk_thread import Disk
from baton.node.errors import SettingsError
from baton.node.leg import LegKey
from baton.node.messages.store import DISK, RAM
from baton.testing.memory_records import memory_tier
from baton.tests.unit.kvtransfer.store.bench import BLOCK_BYTES, NUM_UNITS, SPACE, Host, World, content, names

KEY = LegKey("b", 0)


class Gated:
    """Tiers in memory whose calls wait until a test releases them."""

    def __init__(self) -> None:
        self.tiers: dict[bytes, Tier] = {}
        self.news = threading.Semaphore(0)
        self.maintained = threading.Semaphore(0)
        self.refuse = False

    def open(self, namespace: bytes, block_bytes: int) -> Tier:
        if self.refuse:
            raise SettingsError("no such disk")
        tier = memory_tier(1 << 20, block_bytes, on_check=self.maintained.release)
        self.tiers[namespace] = tier
        return tier


class Bench:
    """A world whose host has a disk; `settle` waits for its threads."""

    def __init__(self, slots: int = 16, max_writing_bytes: int = 1 << 20, first_use_part: float = 0.0) -> None:
        self.gated = Gated()
        self.disk = Disk(self.gated.open, max_writing_bytes, self.gated.news.release, first_use_part)
        self.world = World(host=Host(slots=slots, lower=self.disk))
        self.world.join("a")
        self.world.join("b")
        self.settle(1)  # until the tier is open

    def settle(self, count: int) -> None:
        """Wait until this many reads and writes have ended."""
        for _ in range(count):
            assert self.gated.news.acquire(timeout=60), "the disk's threads do not answer"
        self.world.run()

    def demote(self, *numbers: int) -> None:
        """Put blocks, use them again so that they are written to disk, and evict them from RAM."""
        self.world.put("a", *numbers)
        self.world.find("a", *numbers)
        self.settle(len(numbers))
        self.world.let_go("a")
        for start in range(100, 116, 8):
            self.world.put("b", *range(start, start + 8))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.disk.close()


def test_a_block_is_written_to_disk_at_its_second_use_and_loaded_back(bench: Bench) -> None:
    """Guards both directions: a block evicted from RAM is found on disk and loaded bit for bit."""
    bench.demote(1, 2, 3)
    assert bench.world.find("b", 1, 2, 3, 4) == (DISK, DISK, DISK)
    worker = bench.world.workers["b"]
    worker.session.load(KEY, 0, range(8, 11), bench.world.now)
    bench.world.run()
    bench.settle(3)
    assert [worker.holds(8 + n, 1 + n) for n in range(3)] == [True] * 3
    assert bench.world.find("a", 1, 2, 3) == (RAM, RAM, RAM)
    assert bench.disk.stats()["disk_hits"] == 3


def test_one_use_is_not_written(bench: Bench) -> None:
    """Guards the disk against blocks that are never used again."""
    bench.world.put("a", 1, 2)
    assert bench.disk.stats()["disk_writing_bytes"] == 0
    bench.world.find("b", 1)
    bench.settle(1)
    assert bench.disk.stats()["disk_stored"] == 1


def test_one_use_is_enough_while_the_disk_has_room() -> None:
    """Guards blocks that leave RAM before a second use, and a nearly full disk against blocks without one."""
    made = Bench(first_use_part=2.5 * BLOCK_BYTES / (1 << 20))
    for number in (1, 2, 3):
        made.world.put("a", number)
        made.settle(1)
    made.world.put("a", 4)
    assert made.disk.stats()["disk_writing_bytes"] == 0 and made.disk.stats()["disk_stored"] == 3
    made.disk.close()


def test_a_use_with_a_refused_write_counts() -> None:
    """Guards a block whose second use came while the queue was full: its next use must write it."""
    made = Bench(max_writing_bytes=BLOCK_BYTES - 1)
    made.world.put("a", 1)
    made.world.find("a", 1)
    assert made.disk.stats()["disk_dropped_queue_full"] == 1
    assert made.disk.wants(Key(SPACE, names(1)[0]))
    made.disk.close()


def test_damaged_bytes_are_not_written(bench: Bench) -> None:
    """Guards the tier's own digest, which is computed from the bytes that it gets."""
    bench.world.put("a", 1)
    entry = bench.world.host.server.index.find(Key(SPACE, names(1)[0]))
    assert entry is not None
    bench.world.host.arena.span(entry.offset, 1)[0] ^= 1
    bench.world.find("b", 1)
    bench.settle(1)
    assert bench.disk.stats()["disk_stored"] == 0 and bench.disk.stats()["disk_dropped_spoiled"] == 1


def test_a_block_damaged_before_its_write_is_found_once(bench: Bench) -> None:
    """Guards end-to-end verification: only the worker's digest detects damage before the write."""
    spoiled = bytes([content(1)[0] ^ 1]) + content(1)[1:]
    tier = bench.gated.tiers[SPACE]
    assert tier.put(names(1)[0], memoryview(spoiled), xxh3(memoryview(content(1)), NUM_UNITS))
    assert bench.world.find("b", 1) == (DISK,)
    worker = bench.world.workers["b"]
    worker.session.load(KEY, 0, range(8, 9), bench.world.now)
    bench.world.run()
    bench.settle(1)
    assert worker.session.counters.store_damaged_blocks == 1
    bench.disk.close()  # waits for its threads
    assert tier.contains([names(1)[0]]) == [False] and bench.world.find("b", 1) == ()


def test_a_block_that_has_left_the_disk_meanwhile_is_a_miss(bench: Bench) -> None:
    """Guards the time between lookup and fetch: the load ends before the block, and nothing stays held."""
    bench.demote(1, 2)
    assert bench.world.find("b", 1, 2) == (DISK, DISK)
    bench.gated.tiers[SPACE].drop([names(2)[0]])
    worker = bench.world.workers["b"]
    worker.session.load(KEY, 0, range(8, 10), bench.world.now)
    bench.world.run()
    bench.settle(1)
    assert worker.holds(8, 1) and worker.session.counters.store_failed_blocks == 1
    assert bench.world.host.server.index.num_holders == 0


def test_blocks_being_written_stay_and_those_beyond_the_bound_are_dropped() -> None:
    """Guards memory: held slots are bounded, and a dropped block is written at its next use."""
    bench = Bench(max_writing_bytes=2 * BLOCK_BYTES)
    bench.world.put("a", 1, 2, 3)
    bench.world.find("b", 1, 2, 3)
    bench.settle(2)
    assert bench.disk.stats()["disk_stored"] == 2 and bench.disk.stats()["disk_dropped_queue_full"] == 1
    bench.world.find("a", 3)
    bench.world.find("b", 3)
    bench.settle(1)
    assert bench.disk.stats()["disk_stored"] == 3
    bench.disk.close()


def test_a_disk_that_cannot_be_opened_is_tried_again() -> None:
    """Guards the store against a bad path, where RAM goes on, and a disk that is well again against a restart."""
    gated = Gated()
    gated.refuse = True
    disk = Disk(gated.open, 1 << 20, gated.news.release, upkeep_s=0.001)
    world = World(host=Host(lower=disk))
    world.join("a")
    world.put("a", 1)
    assert world.find("a", 1) == (RAM,) and world.find("a", 1) == (RAM,)
    for _ in range(2):
        assert gated.news.acquire(timeout=60), "it is not tried again"
    assert disk.stats()["disk_open_failures"] >= 2 and "disk_stored" not in disk.stats()
    gated.refuse = False
    while not gated.tiers:
        assert gated.news.acquire(timeout=60), "it is not tried again"
    world.find("a", 1)
    while not disk.stats()["disk_stored"]:
        assert gated.news.acquire(timeout=60), "nothing is written"
    disk.close()


def test_open_tiers_are_looked_after() -> None:
    """Guards a tier that went out of service, and that no request writes to, against staying so."""
    gated = Gated()
    disk = Disk(gated.open, 1 << 20, gated.news.release, upkeep_s=0.001)
    World(host=Host(lower=disk)).join("a")
    assert gated.news.acquire(timeout=60)
    assert gated.maintained.acquire(timeout=60) and gated.maintained.acquire(timeout=60)
    disk.close()
