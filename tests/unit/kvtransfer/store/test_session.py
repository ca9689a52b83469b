"""The store and its workers by messages alone: hits are bit-equal, every fault is a miss, nothing stays held."""

from __future__ import annotations

import random

import pytest

from baton.kvtransfer.blocks.checksum import xxh3
from baton.kvtransfer.blocks.copies import HostCopies
from baton.kvtransfer.store.arena_index import MAX_NAMESPACES, Key
from baton.kvtransfer.store.events import StoreFound, StoreLoaded, StoreWritten
from baton.kvtransfer.store.members import LEASE_S
from baton.kvtransfer.store.session import DOWN_AFTER_S
from baton.node.leg import LegKey
from baton.node.messages.store import (
    PEER,
    RAM,
    STORE_VERSION,
    Arrival,
    Attach,
    Commit,
    Damaged,
    Detached,
    Fetch,
    Fetched,
    Found,
    Lookup,
    PeerData,
    PeerFound,
    Place,
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
    """Run each test with synchronous and asynchronous copies."""
    monkeypatch.setattr(bench, "make_copies", request.param)


def _idle(world: World) -> None:
    """Check that nothing is held and that the accounts are correct."""
    world.host.server.index.check()
    assert world.host.server.index.num_holders == 0


def test_a_worker_loads_anothers_blocks_bit_for_bit() -> None:
    """Guards the whole path: put, lookup by another worker, one copy, everything released."""
    world = World("a", "b")
    assert world.put("a", 1, 2, 3) == 3
    assert world.find("b", 1, 2, 3, 4) == (RAM, RAM, RAM)
    assert world.load("b", range(4, 7)) == 3
    assert [world.workers["b"].holds(4 + n, 1 + n) for n in range(3)] == [True] * 3
    _idle(world)


def test_a_lookup_begins_where_the_pool_ends() -> None:
    """Guards `first`: only blocks behind the worker's own prefix are loaded."""
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
    """Guards room and bandwidth: a stored block is not copied again."""
    world = World("a", "b")
    assert world.put("a", 1, 2) == 2
    assert world.put("b", 1, 2, 3) == 1
    assert world.workers["b"].session.counters.store_written_bytes == BLOCK_BYTES


def test_a_full_store_evicts_the_oldest() -> None:
    """Guards the bound of the arena and its eviction order."""
    world = World("a", host=Host(slots=16))
    for start in range(0, 24, 8):
        assert world.put("a", *range(start, start + 8)) == 8
    assert world.find("a", 0) == () and len(world.find("a", *range(8, 24))) == 16
    assert world.host.server.stats()["ram_evictions_room"] == 8


def test_bits_flipped_in_the_arena_are_a_miss_and_remove_the_block() -> None:
    """Guards against decoding from damaged KV: the run ends before the block, which is not found again."""
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


def test_namespaces_share_no_blocks() -> None:
    """Guards a host with two models: equal hashes of another namespace are not found."""
    world = World("a")
    world.put("a", 1)
    world.join("other", space=b"o" * 32)
    assert world.find("other", 1) == ()


def test_leases_of_a_dead_worker_expire() -> None:
    """Guards the arena against pins and half-written slots of a dead worker: freed after LEASE_S, not before."""
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


def test_beats_renew_leases() -> None:
    """Guards the found blocks of a prompt that waits in the queue for long."""
    world = World("a", "b")
    world.put("a", 1)
    world.find("b", 1)
    world.run(3 * LEASE_S)
    assert world.host.server.index.num_holders == 1
    assert world.load("b", range(1)) == 1


def test_a_resumed_worker_is_detached_and_attaches_again() -> None:
    """Guards fencing: its old leases are void, and its pending loads are misses or correct."""
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
def test_a_silent_store_ends_everything_as_a_miss(phase: str) -> None:
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
        assert worker.events_of(StoreFound)
    world.lost.add("host")
    world.host.wire.clear()
    world.run(DOWN_AFTER_S + 0.5)
    if phase in ("found", "loading"):
        worker.session.load(key, 0, range(2), world.now)
    assert not worker.session.attached
    kind = {"asking": StoreFound, "putting": StoreWritten}.get(phase, StoreLoaded)
    assert len(worker.events_of(kind)) == 1
    assert world.find("a", 1) == () and world.workers["a"].session.counters.store_lookups_lost == 1
    assert world.workers["a"].session.counters.store_disconnects == 1


def test_workers_attach_to_a_restarted_store() -> None:
    """Guards recovery: a new incarnation of the store knows no worker, and workers attach by themselves."""
    world = World("a")
    world.put("a", 1)
    world.host = Host(life=2)
    worker = world.workers["a"]
    worker.session._send = lambda message: world.host.wire.append(("a", "host", message))
    world.run(1.0)
    assert worker.session.attached and world.find("a", 1) == ()
    assert world.put("a", 1) == 1 and world.find("a", 1) == (RAM,)


def test_a_stopped_load_keeps_its_loaded_blocks() -> None:
    """Guards the deadline: computing continues behind the loaded blocks, and no later write reaches the others."""
    world = World("a", "b")
    world.put("a", 1, 2)
    world.find("b", 1, 2)
    session = world.workers["b"].session
    session.load(LegKey("b", 0), 0, range(2), world.now)
    session.stop(LegKey("b", 0), world.now)
    world.run()
    (loaded,) = world.workers["b"].events_of(StoreLoaded)
    assert (
        isinstance(loaded, StoreLoaded)
        and loaded.num_blocks == 0
        and bytes(world.workers["b"].pool.block(0)) == bytes(BLOCK_BYTES)
    )
    _idle(world)


def test_a_late_answer_holds_nothing() -> None:
    """Guards against leases without an owner."""
    world = World("a")
    world.put("a", 1)
    session = world.workers["a"].session
    session.lookup(LegKey("a", 0), names(1), 0, world.now)
    session.stop(LegKey("a", 0), world.now)
    world.run()
    _idle(world)


@pytest.mark.parametrize("right", [True, False])
def test_blocks_of_a_peer_are_verified_before_they_are_found(right: bool) -> None:
    """Guards against damage from another host: a block is verified, or never becomes visible."""
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


def test_a_block_that_arrives_again_is_not_copied_again() -> None:
    """Guards a worker's memory and time against a store that repeats an arrival, or sends what was not asked for."""
    world = World("a")
    world.put("a", 1)
    entry = world.host.server.index.find(Key(SPACE, names(1)[0]))
    assert entry is not None
    session, key = world.workers["a"].session, LegKey("a", 0)
    session.lookup(key, names(1, 2), 0, world.now)
    *_, (_, _, lookup) = world.host.wire
    assert isinstance(lookup, Lookup)
    session.on_message(Found(id=lookup.id, places=(Place(PEER), Place(PEER))), world.now)
    session.load(key, 0, range(4, 6), world.now)
    world.host.wire.clear()  # the store never hears of it
    arrivals = [Arrival(0, entry.offset, entry.digest)] * 50 + [Arrival(7, entry.offset, entry.digest)] * 50
    session.on_message(Fetched(id=lookup.id, arrivals=tuple(arrivals)), world.now)
    world.run()
    assert session.counters.store_loaded_bytes == BLOCK_BYTES and world.workers["a"].holds(4, 1)


def test_a_flood_of_namespaces_is_refused() -> None:
    """Guards what a store remembers of each namespace."""
    world = World("a")
    for number in range(2 * MAX_NAMESPACES):
        attach = Attach(namespace=bytes([number]) * 32, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS, digest="xxh3")
        world.host.server.on_message(f"w{number}", attach, world.now)
    *_, (_, _, refused) = world.host.wire
    assert isinstance(refused, Detached) and "namespaces" in refused.reason
    assert len(world.host.server._spaces) == MAX_NAMESPACES
    world.host.wire.clear()
    assert world.put("a", 1) == 1


def test_a_namespace_has_one_kind_of_digest() -> None:
    """Guards hits between workers: a reader with another kind of digest would take every block for damaged."""
    world = World("a")
    sum64 = Attach(namespace=SPACE, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS, digest="sum64")
    world.host.server.on_message("b", sum64, world.now)
    *_, (_, to, refused) = world.host.wire
    assert to == "b" and isinstance(refused, Detached) and refused.final and "sum64" in refused.reason
    world.host.wire.clear()
    assert world.put("a", 1) == 1 and world.find("a", 1) == (RAM,)


def test_a_false_alarm_removes_nothing() -> None:
    """Guards intact blocks against a worker that read a slot after its lease had expired."""
    world = World("a")
    world.put("a", 1)
    for _ in range(2):
        world.host.server.on_message("a", Damaged(hash=names(1)[0]), world.now)
    world.run()
    assert world.find("a", 1) == (RAM,)
    world.let_go("a")
    _idle(world)


def test_invalid_messages_are_ignored() -> None:
    """Guards the store against faulty workers: no message raises, nothing stays held."""
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
        Attach(version=STORE_VERSION + 1, namespace=SPACE, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS, digest="xxh3"),
        Attach(namespace=SPACE, block_bytes=BLOCK_BYTES + 1, num_units=1, digest="xxh3"),
        Attach(namespace=SPACE, block_bytes=BLOCK_BYTES, num_units=NUM_UNITS + 1, digest="xxh3"),
        Attach(namespace=b"z" * 32, block_bytes=1 << 30, num_units=1, digest="xxh3"),
        Attach(namespace=b"z" * 32, block_bytes=4094, num_units=1, digest="sum64"),
        Attach(namespace=b"z" * 32, block_bytes=4096, num_units=3, digest="xxh3"),
    ):
        server.on_message("a", message, world.now)
        server.on_message("unknown", message, world.now)
    _idle(world)


def test_any_order_of_losses_and_deaths_gives_correct_bytes_or_a_miss() -> None:
    """Guards the whole protocol: under any loss, loaded bytes are correct and every operation ends."""
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
            if worker.puts_open:  # blocks must not change while they are being put
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
