"""Asynchronous copies between pool and arena: when events are delivered, and when memory may be reused."""

from __future__ import annotations

import pytest

from baton.kvtransfer.blocks.checksum import xxh3
from baton.kvtransfer.blocks.copies import Copies, HostCopies, Pair
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.store.copy_queue import COPY_S
from baton.kvtransfer.store.events import StoreLoaded, StoreWritten
from baton.kvtransfer.store.members import LEASE_S
from baton.kvtransfer.store.session import DOWN_AFTER_S, GIVE_UP_S, UNUSABLE_S
from baton.node.errors import InvariantBroken
from baton.node.leg import LegKey
from baton.node.messages.store import RAM
from baton.tests.unit.kvtransfer.store import bench
from baton.tests.unit.kvtransfer.store.bench import BLOCK_BYTES, NUM_UNITS, Host, World, content, names
from baton.tests.unit.kvtransfer.store.late_copies import LateCopies

KEY = LegKey("b", 0)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "make_copies", LateCopies)


def found(*numbers: int) -> World:
    """Worker a has put these blocks and b has found them; b's copies do not end."""
    world = World("a", "b", host=Host(slots=32))
    assert world.put("a", *numbers) == len(numbers)
    assert world.find("b", *numbers) == (RAM,) * len(numbers)
    world.workers["b"].copies.held = True
    return world


def release(world: World, name: str = "b") -> None:
    world.workers[name].copies.held = False
    world.run()


@pytest.mark.parametrize("make", [HostCopies, LateCopies])
def test_every_kind_moves_the_bytes_and_reports_the_digests(make: type[HostCopies] | type[LateCopies]) -> None:
    """The contract of all copies: bytes and digests by block, in the order of the pairs."""
    pool, arena = HostMemory(8, BLOCK_BYTES, NUM_UNITS), HostMemory(8, BLOCK_BYTES)
    copies: Copies = make(pool)
    lock = copies.lock(arena.view)
    assert lock.ready()
    for block in range(8):
        pool.block(block)[:] = content(block)

    def ended(copy: int) -> list[bytes]:
        for _ in range(10):
            if (digests := copies.ended(copy)) is not None:
                return digests
        raise AssertionError("it does not end")

    save = copies.begin_save([Pair(6, arena.block(0)), Pair(2, arena.block(5))])
    assert ended(save) == [xxh3(memoryview(content(6)), NUM_UNITS), xxh3(memoryview(content(2)), NUM_UNITS)]
    load = copies.begin_load([Pair(1, arena.block(5)), Pair(7, arena.block(0))])
    assert ended(load) == [xxh3(memoryview(content(2)), NUM_UNITS), xxh3(memoryview(content(6)), NUM_UNITS)]
    assert [bytes(pool.block(block)) for block in (1, 7, 2, 6, 0)] == [content(n) for n in (2, 6, 2, 6, 0)]
    lock.close()
    copies.close()
    copies.close()


@pytest.mark.usefixtures("late")
def test_a_stopped_load_is_reported_after_its_last_copy() -> None:
    """Guards the blocks, which may be reused after StoreLoaded while the GPU could still write them."""
    world = found(1, 2, 3, 4, 5, 6)
    worker = world.workers["b"]
    worker.session.load(KEY, 0, range(6), world.now)
    world.run()
    assert worker.copies.touched == {0, 1, 2, 3}, "two batches of two"
    worker.session.stop(KEY, world.now)
    worker.session.stop(KEY, world.now)
    world.run(0.5)
    assert not worker.events_of(StoreLoaded) and world.host.server.index.num_holders == 1
    release(world)
    (loaded,) = worker.events_of(StoreLoaded)
    assert isinstance(loaded, StoreLoaded) and loaded.num_blocks == 4 and worker.holds(3, 4)
    assert len(worker.copies.begun) == 2 and world.host.server.index.num_holders == 0


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("kind", [StoreLoaded, StoreWritten])
def test_a_store_that_is_lost_during_copies(kind: type) -> None:
    """Guards pool and arena: no event, unmapping or new mapping while a copy runs, and no new work meanwhile."""
    world = found(1, 2, 3)
    worker = world.workers["b"]
    if kind is StoreLoaded:
        worker.session.load(KEY, 0, range(3), world.now)
    else:
        worker.session.put(b"x", names(11, 12, 13), range(3), world.now)
    world.run()
    assert worker.copies.touched
    world.lost.add("host")
    world.run(DOWN_AFTER_S + 1)
    assert not worker.session.attached and worker.session.store == "" and worker.session.counters.store_disconnects == 1
    assert not worker.events_of(kind) and not worker.copies.locks[0].closed
    world.lost.clear()
    world.run(1.0)
    assert not worker.session.attached, "the old memory is still in use"
    release(world)
    assert len(worker.events_of(kind)) == 1 and worker.copies.locks[0].closed
    world.run(1.0)
    assert worker.session.attached and world.find("b", 1) == (RAM,) and world.load("b", range(1)) == 1


@pytest.mark.usefixtures("late")
def test_an_expired_load_waits_for_its_copies() -> None:
    """Guards the deadline of a load: it drops copies that have not begun, and ends with the others."""
    world = found(*range(1, 7))
    worker = world.workers["b"]
    worker.session.load(KEY, 0, range(6), world.now)
    world.run(GIVE_UP_S + 1)
    assert not worker.events_of(StoreLoaded)
    release(world)
    assert [event.num_blocks for event in worker.events_of(StoreLoaded)] == [4]


@pytest.mark.usefixtures("late")
def test_bits_flipped_by_a_copy_are_a_miss_but_the_block_stays() -> None:
    """Guards the check of the pool's bytes: the arena's are intact, so the next reader gets a hit."""
    world = found(1, 2, 3)
    worker = world.workers["b"]
    worker.copies.held, worker.copies.spoil = False, {1}
    assert world.load("b", range(3)) == 1 and worker.session.counters.store_damaged_blocks == 1
    worker.copies.spoil = set()
    assert world.find("b", 1, 2, 3) == (RAM,) * 3 and world.load("b", range(3)) == 3


@pytest.mark.usefixtures("late")
def test_loads_go_before_puts_and_batches_are_bounded() -> None:
    """Guards prompts, which wait for loads, against write-behind."""
    world = found(*range(1, 7))
    worker = world.workers["b"]
    for block in range(8, 14):
        worker.fill(block, 100 + block)
    worker.session.put(b"x", names(*range(108, 114)), range(8, 14), world.now)
    worker.session.load(KEY, 0, range(6), world.now)
    world.run()
    release(world)
    order = [kind for kind, _ in worker.copies.begun]
    assert order == ["load"] * 3 + ["save"] * 3 and all(len(blocks) == 2 for _, blocks in worker.copies.begun)
    assert worker.events_of(StoreWritten)[-1].num_blocks == 6 and worker.events_of(StoreLoaded)[-1].num_blocks == 6


@pytest.mark.usefixtures("late")
def test_a_stuck_or_failed_copy_ends_the_worker() -> None:
    """Guards against a worker that waits forever for a lost GPU: it exits with the error."""
    world = found(1)
    worker = world.workers["b"]
    worker.session.load(KEY, 0, range(1), world.now)
    world.run()
    world.now += COPY_S + 1
    with pytest.raises(InvariantBroken, match="not copied"):
        worker.session.work(lambda: world.now)
    worker.copies.broken = True
    with pytest.raises(RuntimeError, match="gone"):
        worker.session.work(lambda: world.now)
    worker.session.close()
    assert worker.copies.closed and all(lock.closed for lock in worker.copies.locks)


def test_an_arena_counts_when_its_pages_are_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the seconds of page locking: the worker sends beats and no requests, and neither lease expires."""
    world = World("a")
    made: list[LateCopies] = []

    def locking(pool: HostMemory) -> LateCopies:
        made.append(LateCopies(pool))
        made[-1].locking = True
        return made[-1]

    monkeypatch.setattr(bench, "make_copies", locking)
    worker = world.join("b")
    world.run(LEASE_S + DOWN_AFTER_S)
    assert not worker.session.attached and worker.session.store == "" and world.find("b", 1) == ()
    assert world.host.server.stats()["workers"] == 2 and len(made[0].locks) == 1
    made[0].locking = False
    world.run(1.0)
    assert worker.session.attached and worker.session.store and world.put("b", 1) == 1


def test_an_arena_whose_pages_cannot_be_locked_is_retried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the host's memory against a try each second; the worker computes meanwhile."""
    world = World()
    monkeypatch.setattr(bench, "make_copies", LateCopies)
    copies = bench.Worker("x", world.host.wire).copies
    copies.unlockable = True
    monkeypatch.setattr(bench, "make_copies", lambda pool: copies)
    worker = world.join("b")
    world.run(UNUSABLE_S / 2)
    assert not worker.session.attached and len(copies.locks) == 1 and copies.locks[0].closed
    copies.unlockable = False
    world.run(UNUSABLE_S)
    assert worker.session.attached
