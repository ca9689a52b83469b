"""The store and its workers over messages alone: hits are bit-equal, every fault is a miss, nothing stays held."""

from __future__ import annotations

import random

import pytest

from baton.kvtransfer.blocks.checksum import xxh3
from baton.kvtransfer.blocks.copies import HostCopies
from baton.kvtransfer.store.arena_index import Key
from baton.kvtransfer.store.events import StoreFound, StoreLoaded, StoreWritten
from baton.kvtransfer.store.server import LEASE_S
from baton.kvtransfer.store.session import DOWN_AFTER_S
from baton.node.leg import LegKey
from baton.node.messages.base import PROTOCOL_VERSION
from baton.node.messages.store import (
    RAM,
    Attach,
    Commit,
    Damaged,
    Detached,
    Fetch,
    Lookup,
    PeerData,
    PeerFound,
    Put,
    Release,
    Touch,
    Written,
)
from baton.tests.unit.kvtransfer.store import bench
from baton.tests.unit.kvtransfer.store.bench import BLOCK_BYTES, NUM_UNITS, SPACE, Host, Worker, World, content, names
from baton.tests.unit.kvtransfer.store.late_copies import LateCopies


@pytest.fixture(autouse=True, params=[HostCopies, LateCopies])
def kind_of_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for copies that are done at once, and for those that end later."""
    monkeypatch.setattr(bench, "make_copies", request.param)


def _idle(world: World) -> None:
    """Nothing is held, and the sums are right."""
    world.host.server.index.check()
    assert world.host.server.index.num_holders == 0


def test_what_one_worker_put_another_loads_bit_for_bit() -> None:
    """Guards the whole of it: put, find by another, one copy, everything released."""
    world = World("a", "b")
    assert world.put("a", 1, 2, 3) == 3
    assert world.find("b", 1, 2, 3, 4) == (RAM, RAM, RAM)
    assert world.load("b", range(4, 7)) == 3
    assert [world.workers["b"].holds(4 + n, 1 + n) for n in range(3)] == [True] * 3
    _idle(world)


def test_a_lookup_begins_where_the_pool_ends() -> None:
    """Guards `first`: blocks that the worker has are not loaded, those behind them are."""
    world = World("a", "b")
    world.put("a", 1, 2, 3)
    assert world.find("b", 9, 2, 3, first=1) == (RAM, RAM)
    assert world.load("b", range(2)) == 2
    assert world.workers["b"].holds(0, 2) and world.workers["b"].holds(1, 3)


def test_only_the_run_without_a_gap_is_found() -> None:
    """Guards prefix semantics: KV behind a gap is useless."""
    world = World("a", "b")
    world.put("a", 1, 3)
    assert world.find("b", 1, 2, 3) == (RAM,)
    world.workers["b"].session.stop(LegKey("b", 0), world.now)
    world.run()
    _idle(world)


def test_a_block_is_stored_once() -> None:
    """Guards room and bandwidth: what is there already is not copied again."""
    world = World("a", "b")
    assert world.put("a", 1, 2) == 2
    assert world.put("b", 1, 2, 3) == 1
    assert world.workers["b"].session.counters.store_written_bytes == BLOCK_BYTES


def test_a_full_store_evicts_the_oldest() -> None:
    """Guards the bound of the arena and its order."""
    world = World("a", host=Host(slots=16))
    for start in range(0, 24, 8):
        assert world.put("a", *range(start, start + 8)) == 8
    assert world.find("a", 0) == () and len(world.find("a", *range(8, 24))) == 16
    assert world.host.server.stats()["ram_evictions_room"] == 8


def test_bits_flipped_in_the_arena_are_a_miss_and_the_block_goes() -> None:
    """Guards against decoding from damaged KV: the run ends before the block, and nobody finds it again."""
    world = World("a", "b")
    world.put("a", 1, 2, 3)
    entry = world.host.server.index.find(Key(SPACE, names(2)[0]))
    assert entry is not None
    world.host.arena.span(entry.offset, 1)[0] ^= 1
    assert len(world.find("b", 1, 2, 3)) == 3
    assert world.load("b", range(3)) == 1
    assert world.workers["b"].session.counters.store_damaged_blocks == 1
    assert len(world.find("b", 1, 2, 3)) == 1
    world.workers["b"].session.stop(LegKey("b", 0), world.now)
    world.run()
    _idle(world)


def test_namespaces_never_meet() -> None:
    """Guards a host that serves two models: equal hashes of another namespace are not found."""
    world = World("a")
    world.put("a", 1)
    world.join("other", space=b"o" * 32)
    assert world.find("other", 1) == ()


def test_a_worker_that_dies_leaves_its_leases_to_time() -> None:
    """Guards the arena against pins and half-written slots of the dead: free after LEASE_S, not before."""
    world = World("a", "b")
    world.put("a", 1)
    world.find("b", 1)
    world.workers["b"].session.put(b"x", names(7), [0], world.now)
    world.deliver()  # the slot is granted, and b dies before it writes
    world.lost.add("b")
    world.run(LEASE_S - 0.5)
    assert world.host.server.index.num_holders == 2
    world.run(1.0)
    _idle(world)
    assert world.find("a", 7) == ()


def test_a_worker_that_lives_keeps_its_leases() -> None:
    """Guards a prompt that waits long in the queue with blocks found: beats renew."""
    world = World("a", "b")
    world.put("a", 1)
    world.find("b", 1)
    world.run(3 * LEASE_S)
    assert world.host.server.index.num_holders == 1
    assert world.load("b", range(1)) == 1


def test_a_frozen_worker_that_wakes_up_is_told_and_starts_anew() -> None:
    """Guards the fence: what it held is over, it attaches again, and what it meant to load is a miss or right."""
    world = World("a", "b")
    world.put("a", 1)
    world.find("b", 1)
    world.lost.add("b")
    frozen = world.workers.pop("b")
    world.run(LEASE_S + 1)
    world.lost.clear()
    world.workers["b"] = frozen
    assert world.load("b", range(1)) in (0, 1)
    world.run(2.0)
    assert frozen.session.attached and world.find("b", 1) == (RAM,) and world.load("b", range(1)) == 1
    assert frozen.holds(0, 1)


@pytest.mark.parametrize("phase", ["asking", "found", "loading", "putting"])
def test_a_store_that_falls_silent_ends_everything_as_a_miss(phase: str) -> None:
    """Guards every request against a dead or frozen store: one event each, then nothing until it is back."""
    world = World("a")
    world.put("a", 1, 2)
    worker, key = world.workers["a"], LegKey("a", 0)
    worker.events.clear()
    if phase == "putting":
        worker.session.put(b"x", names(5), [0], world.now)
    else:
        worker.session.lookup(key, names(1, 2), 0, world.now)
    if phase in ("found", "loading"):
        world.deliver()
        world.deliver()
        assert worker.told(StoreFound)
    world.lost.add("host")
    world.host.wire.clear()
    world.run(DOWN_AFTER_S + 0.5)
    if phase in ("found", "loading"):
        worker.session.load(key, 0, range(2), world.now)
    assert not worker.session.attached
    kind = {"asking": StoreFound, "putting": StoreWritten}.get(phase, StoreLoaded)
    assert len(worker.told(kind)) == 1
    assert world.find("a", 1) == () and world.workers["a"].session.counters.store_lookups_lost == 1
    assert world.workers["a"].session.counters.store_disconnects == 1


def test_a_store_that_is_restarted_is_found_again() -> None:
    """Guards the way back: a new life of the store knows nobody, and workers attach to it by themselves."""
    world = World("a")
    world.put("a", 1)
    world.host = Host(life=2)
    worker = world.workers["a"]
    worker.session._send = lambda message: world.host.wire.append(("a", "host", message))
    world.run(1.0)
    assert worker.session.attached and world.find("a", 1) == ()
    assert world.put("a", 1) == 1 and world.find("a", 1) == (RAM,)


def test_a_load_that_is_stopped_keeps_what_has_come() -> None:
    """Guards the deadline: computing goes on behind the blocks that are there, and nobody writes to the others."""
    world = World("a", "b")
    world.put("a", 1, 2)
    world.find("b", 1, 2)
    session = world.workers["b"].session
    session.load(LegKey("b", 0), 0, range(2), world.now)
    session.stop(LegKey("b", 0), world.now)
    world.run()
    (loaded,) = world.workers["b"].told(StoreLoaded)
    assert (
        isinstance(loaded, StoreLoaded)
        and loaded.num_blocks == 0
        and bytes(world.workers["b"].pool.block(0)) == bytes(BLOCK_BYTES)
    )
    _idle(world)


def test_an_answer_that_comes_too_late_holds_nothing() -> None:
    """Guards against leases that nobody knows of."""
    world = World("a")
    world.put("a", 1)
    session = world.workers["a"].session
    session.lookup(LegKey("a", 0), names(1), 0, world.now)
    session.stop(LegKey("a", 0), world.now)
    world.run()
    _idle(world)


@pytest.mark.parametrize("right", [True, False])
def test_what_a_peer_gives_is_looked_at_before_anybody_finds_it(right: bool) -> None:
    """Guards this host from another's damage: the block is in RAM for all, or was never here."""
    world = World("a", host=Host(links=("peer",)))
    server, (name,), data = world.host.server, names(1), content(1)
    world.workers["a"].session.lookup(LegKey("a", 1), (name,), 0, world.now)
    world.run()
    server.on_message("peer", PeerFound(id=1, count=1), world.now)
    world.run()
    world.workers["a"].session.load(LegKey("a", 1), 0, range(1), world.now)
    world.run()
    digest = xxh3(memoryview(data if right else content(2)), NUM_UNITS)
    server.on_message("peer", PeerData(namespace=SPACE, hash=name, offset=0, digest=digest, data=data), world.now)
    world.run()
    assert world.workers["a"].holds(0, 1) is right
    assert (server.index.find(Key(SPACE, name)) is not None) is right
    assert server.stats()["loads_peer_ok" if right else "loads_peer_failed"] == 1
    _idle(world)


def test_two_ways_of_making_digests_never_meet_in_a_namespace() -> None:
    """Guards hits between workers: a block whose digest the reader makes another way would count as damaged."""
    world = World("a")
    sum64 = Attach(namespace=SPACE, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS, digest="sum64")
    world.host.server.on_message("b", sum64, world.now)
    *_, (_, to, refused) = world.host.wire
    assert to == "b" and isinstance(refused, Detached) and refused.final and "sum64" in refused.reason
    world.host.wire.clear()
    assert world.put("a", 1) == 1 and world.find("a", 1) == (RAM,)


def test_a_false_alarm_removes_nothing() -> None:
    """Guards good blocks against a worker that read a slot which was not its own any more."""
    world = World("a")
    world.put("a", 1)
    for _ in range(2):
        world.host.server.on_message("a", Damaged(hash=names(1)[0]), world.now)
    world.run()
    assert world.find("a", 1) == (RAM,)
    world.let_go("a")
    _idle(world)


def test_what_makes_no_sense_is_survived() -> None:
    """Guards the store against workers that are not in their right mind: no message raises, nothing stays held."""
    world = World("a")
    world.put("a", 1, 2)
    server, key = world.host.server, names(1)
    for message in (
        Fetch(id=77, indices=(0, 5)),
        Commit(id=77, written=(Written(3, b"x" * 16),)),
        Release(id=77),
        Touch(hashes=names(1, 99)),
        Lookup(id=5, first=9, hashes=key),
        Lookup(id=5, first=0, hashes=key),
        Fetch(id=5, indices=(9,)),
        Put(id=5, hashes=key),
        Put(id=6, hashes=names(9, 9, 9)),
        Commit(id=6, written=(Written(0, b"x" * 16), Written(0, b"y" * 16), Written(2, b"z" * 16))),
        Release(id=5),
        Attach(
            version=PROTOCOL_VERSION + 1, namespace=SPACE, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS, digest="xxh3"
        ),
        Attach(namespace=SPACE, block_bytes=BLOCK_BYTES + 1, num_units=1, digest="xxh3"),
        Attach(namespace=SPACE, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS + 1, digest="xxh3"),
        Attach(namespace=b"z" * 32, block_bytes=1 << 30, num_units=1, digest="xxh3"),
        Attach(namespace=b"z" * 32, block_bytes=4094, num_units=1, digest="sum64"),
        Attach(namespace=b"z" * 32, block_bytes=4096, num_units=3, digest="xxh3"),
    ):
        server.on_message("a", message, world.now)
        server.on_message("stranger", message, world.now)
    _idle(world)


def test_any_order_of_losses_and_deaths_gives_right_bytes_or_a_miss() -> None:
    """Guards the protocol as a whole: whatever is lost, whatever was loaded is what was meant, and all ends."""
    for seed in range(40):
        _chaos(random.Random(seed))


def _chaos(rng: random.Random) -> None:
    world = World("a", "b", "c", host=Host(slots=16))
    asked = 0
    for _ in range(30):
        name = rng.choice("abc")
        worker: Worker = world.workers[name]
        chain = [rng.randrange(3) * 10 + depth for depth in range(rng.randint(1, 6))]
        world.lost = {each for each in ("a", "b", "c", "host") if rng.random() < 0.05}
        if rng.random() < 0.5:
            if worker.puts_open:  # blocks that are being put may not change
                continue
            for block, number in enumerate(chain):
                worker.fill(block, number)
            worker.session.put(b"%d" % asked, names(*chain), range(len(chain)), world.now)
            world.deliver(rng.randrange(6))
        else:
            asked += 1
            key = LegKey(name, asked)
            worker.session.lookup(key, names(*chain), 0, world.now)
            world.run()
            if rng.random() < 0.2:
                worker.session.stop(key, world.now)
            else:
                worker.session.load(key, 0, range(8, 8 + len(chain)), world.now)
                world.run(rng.choice((0.0, 0.3)))
                for event in [each for each in worker.events if isinstance(each, StoreLoaded) and each.key == key]:
                    assert all(worker.holds(8 + block, chain[block]) for block in range(event.num_blocks))
        if rng.random() < 0.2:
            entry = next(iter(world.host.server.index._entries.values()), None)
            if entry is not None:
                world.host.arena.span(entry.offset, 1)[0] ^= 0x40
        world.host.server.index.check()
    world.lost = {"a", "b", "c"}
    world.run(LEASE_S + 1)
    _idle(world)
