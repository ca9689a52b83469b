"""The plane between groups of ranks: any size fills any other bit for bit, and a lost rank fails a chunk once.

The contract of all planes is in test_planes.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest

from baton.kvtransfer.blocks.checksum import sum64, unit_checksums
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.planes.base import ChunkKey, IoDone, Plane
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.kvtransfer.protocol.events import Event, KvArrived, ReceiverEnded
from baton.kvtransfer.protocol.exchange import ChunkLimits, TransferExchange
from baton.kvtransfer.protocol.pairs import PeerTransport
from baton.kvtransfer.protocol.receiver import Incoming
from baton.kvtransfer.reshard import Cut
from baton.node.credentials import Credentials
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.sockets import Context
from baton.testing.host_rank_pools import HostRankPools, HostUnitMemory
from baton.testing.loopback import Fate, LoopbackFabric, Outcome

UNITS, LAYERS, NUM_BLOCKS = 4, 2, 9
PREFILL, DECODE = "prefill/1", "decode/1"
X = b"x" * 16
SIZES = [(2, 1), (1, 2), (2, 4), (4, 2), (8, 2), (2, 8), (8, 8)]
MakeEnd = Callable[[str, Plane], Plane]


@dataclass
class PooledRanks:
    """A worker's ranks with their pools."""

    name: str
    pools: HostRankPools
    plane: ShardedPlane

    def fill(self, seed: int) -> None:
        """With the KV of a model: copies of a unit are equal."""
        for block in range(NUM_BLOCKS):
            for unit in range(UNITS):
                data = random.Random(f"{seed} {block} {unit}").randbytes(self.pools.memories[0].block_bytes)
                for rank in self.pools.cut.holders(unit):
                    self._unit(rank, block, unit)[:] = data

    def unit(self, rank: int, block: int, unit: int) -> bytes:
        return bytes(self._unit(rank, block, unit))

    def _unit(self, rank: int, block: int, unit: int) -> memoryview:
        memory, first = self.pools.memories[rank], self.pools.cut.units(rank).start
        return memory.block(block * memory.units_per_block + unit - first)

    def corrupt(self, rank: int, block: int) -> None:
        self.pools.pools[rank].block(block)[5] ^= 1


class Rig:
    def __init__(self) -> None:
        self.context = Context(Credentials("decode"))
        self.fabric = LoopbackFabric()
        self.groups: list[PooledRanks] = []

    def group(self, name: str, ranks: int, kind: str = "loopback") -> PooledRanks:
        cut = Cut.even(UNITS, ranks, LAYERS)
        held = [cut.units(rank) for rank in range(ranks)]
        pools = HostRankPools(
            cut,
            [BlockPool(KVLayout(LAYERS, own.start, len(own), UNITS, 8, 4, "float32"), NUM_BLOCKS) for own in held],
        )
        ends: list[Plane] = []
        for rank, memory in enumerate(pools.memories):
            if kind == "zmq":
                ends.append(ZmqPlane(self.context, memory, rank_name(name, rank)))
            elif kind == "loopback":
                ends.append(self.fabric.plane(rank_name(name, rank), memory))
            else:
                end = ShmPlane(memory)
                ends.append(SummingEnd(end, memory) if kind == "summing" else end)  # type: ignore[arg-type]
        group = PooledRanks(name, pools, ShardedPlane(cut, NUM_BLOCKS, ends))
        for other in self.groups:
            other.plane.connect(name, group.plane.describe())
            group.plane.connect(other.name, other.plane.describe())
        self.groups.append(group)
        return group

    def close(self) -> None:
        for group in self.groups:
            group.plane.close()
            group.pools.close()
        self.context.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def move(
    sender: PooledRanks, receiver: PooledRanks, key: ChunkKey, source: list[int], blocks: list[int], polls: int = 2000
):  # type: ignore[no-untyped-def]
    receiver.plane.post_receive(sender.name, key, source, blocks)
    sender.plane.post_send(receiver.name, key, source)
    done: list[IoDone] = []
    for _ in range(polls):
        for group in (sender, receiver):
            for socket in group.plane.sockets():
                socket.poll(1)  # type: ignore[attr-defined]
            done += group.plane.poll()
        if len(done) == 2:
            break
    return done


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["loopback", "shm"])
def test_every_rank_gets_its_units_and_nothing_else_changes(rig: Rig, sizes: tuple[int, int], kind: str) -> None:
    """Guards against swapped heads, blocks counted as units, and ranks with copies that are left out."""
    sender, receiver = rig.group(PREFILL, sizes[0], kind), rig.group(DECODE, sizes[1], kind)
    sender.fill(1)
    receiver.fill(2)
    assert receiver.plane.reaches(sender.plane.describe())
    source, blocks = [7, 2, 3, 4], [0, 6, 7, 1]
    done = move(sender, receiver, ChunkKey(X, 3, 0), source, blocks)
    assert sorted((each.sending, each.ok) for each in done) == [(False, True), (True, True)]
    expected = rig.group("expected", sizes[1], kind)
    expected.fill(2)
    for rank in range(sizes[1]):
        for unit in receiver.pools.cut.units(rank):
            holder = sender.pools.cut.holders(unit)[0]
            for theirs, ours in zip(source, blocks, strict=True):
                assert receiver.unit(rank, ours, unit) == sender.unit(holder, theirs, unit)
            for block in set(range(NUM_BLOCKS)) - set(blocks):
                assert receiver.unit(rank, block, unit) == expected.unit(rank, block, unit)
    assert receiver.pools.digests([blocks]) == sender.pools.digests([source])
    assert receiver.plane.idle(X) and sender.plane.idle(X)


class SummingEnd:
    """An end in host memory that makes checksums of what it receives, as `cuda_ipc` does."""

    def __init__(self, end: Plane, memory: HostUnitMemory) -> None:
        self._end, self._memory = end, memory
        self._receives: dict[ChunkKey, Sequence[int]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._end, name)

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        self._receives[key] = blocks
        self._end.post_receive(peer, key, source, blocks)

    def poll(self) -> list[IoDone]:
        return [each if each.sending else replace(each, sums=self._sums(each.key)) for each in self._end.poll()]

    def _sums(self, key: ChunkKey) -> bytes:
        units = [np.frombuffer(self._memory.block(unit), dtype=np.uint8) for unit in self._receives.pop(key)]
        return unit_checksums(np.stack(units)).tobytes()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_of_ends_become_the_digest_that_one_pool_has(rig: Rig, sizes: tuple[int, int]) -> None:
    """Guards against sums that are put in another order than the sender's, and digests of ranks that are made twice."""
    sender, receiver = rig.group(PREFILL, sizes[0], "shm"), rig.group(DECODE, sizes[1], "summing")
    sender.fill(1)
    source, blocks = [7, 2, 3, 4], [0, 6, 7, 1]
    done = move(sender, receiver, ChunkKey(X, 3, 0), source, blocks)
    units = [sender.unit(sender.pools.cut.holders(unit)[0], block, unit) for block in source for unit in range(UNITS)]
    (received,) = [each for each in done if not each.sending]
    assert received.ok and received.digest == sum64(memoryview(b"".join(units)), len(units))


def test_one_end_without_sums_leaves_the_digest_to_the_receiver(rig: Rig) -> None:
    """Guards against a digest over the units of some ranks, where an end had no room for sums."""
    sender, receiver = rig.group(PREFILL, 2, "shm"), rig.group(DECODE, 4, "summing")
    (*_, last) = receiver.plane._ends
    with patch.object(last, "_sums", return_value=b""):
        done = move(sender, receiver, ChunkKey(X, 3, 0), [1], [2])
    assert len(done) == 2 and all(each.ok and not each.digest for each in done)


def test_groups_meet_over_a_network(rig: Rig) -> None:
    """Guards against identities and ids that a plane with sockets does not take."""
    sender, receiver = rig.group(PREFILL, 2, "zmq"), rig.group(DECODE, 4, "zmq")
    sender.fill(1)
    done = move(sender, receiver, ChunkKey(X, 0, 0), [1, 2], [3, 4])
    assert all(each.ok for each in done) and receiver.pools.digests([[3, 4]]) == sender.pools.digests([[1, 2]])


def test_digests_are_those_of_one_pool_and_see_a_damaged_copy(rig: Rig) -> None:
    """Guards against workers of different sizes that refuse each other's KV, and copies that nothing verifies."""
    groups = [rig.group(f"worker/{ranks}", ranks) for ranks in (1, 2, 8)]
    for group in groups:
        group.fill(1)
    whole = groups[0].pools.pools[0]
    for group in groups:
        assert group.pools.digests([[1, 2], [5]]) == whole.digests([[1, 2], [5]])
    groups[2].corrupt(rank=1, block=5)  # the second copy of unit 0
    assert groups[2].pools.digests([[1, 2], [5]])[0] == whole.digest([1, 2])
    assert groups[2].pools.digests([[5]]) != [whole.digest([5])]


def test_the_first_piece_that_fails_fails_the_chunk_once_the_others_are_over(rig: Rig) -> None:
    """Guards against a retry into blocks that a piece of the failed attempt still writes, and a second report."""
    rig.fabric.polls_to_stop = 3
    rig.fabric.script = lambda movement: (
        Fate(Outcome.FAIL) if movement.receiver == rank_name(DECODE, 2) else Fate(after_polls=50)
    )
    sender, receiver = rig.group(PREFILL, 2), rig.group(DECODE, 4)
    receiver.plane.post_receive(PREFILL, ChunkKey(X, 0, 0), [1], [1])
    sender.plane.post_send(DECODE, ChunkKey(X, 0, 0), [1])
    polls = [receiver.plane.poll() for _ in range(8)]
    assert polls[0] == []
    reported = [number for number, done in enumerate(polls) if done]
    assert len(reported) == 1 and reported[0] >= 3, "not before the others are idle"
    (done,) = polls[reported[0]]
    assert (done.ok, done.sending, done.key) == (False, False, ChunkKey(X, 0, 0)) and "rank 2" in done.reason
    assert receiver.plane.idle(X)


def test_a_group_of_another_model_is_not_reached(rig: Rig) -> None:
    """Guards against a plan for heads that the peer does not have."""
    sender, receiver = rig.group(PREFILL, 2), rig.group(DECODE, 4)
    other = ShardedPlane(Cut.even(UNITS, 2, LAYERS + 1), NUM_BLOCKS, [Ended(), Ended()])  # type: ignore[list-item]
    assert receiver.plane.reaches(sender.plane.describe())
    assert not receiver.plane.reaches(other.describe())


class Ended:
    """Of an end, no more than its description."""

    name, pulls = "loopback", False

    def describe(self):  # type: ignore[no-untyped-def]
        return LoopbackFabric().plane("x", BlockPool(KVLayout(1, 0, 1, 1, 8, 4, "float32"), 2)).describe()


class Exchanges:
    """The transfer protocol of a prefill and a decode group in one thread."""

    def __init__(self, groups: Sequence[PooledRanks]) -> None:
        self.now = 0.0
        self._mail: list[tuple[str, str, Message]] = []
        self.ends = {
            group.name: TransferExchange(
                group.name,
                b"n" * 32,
                [group.plane],
                group.pools.digests,
                PeerTransport(self._sender(group.name), lambda peer, address: None, lambda peer: None),
                ChunkLimits(3, window=2),
            )
            for group in groups
        }

    def _sender(self, name: str) -> Callable[[str, Message], bool]:
        def send(peer: str, message: Message) -> bool:
            self._mail.append((name, peer, message))
            return True

        return send

    def run(self, source: list[int], target: tuple[int, ...], on_turn: Callable[[int], None]) -> list[Event]:
        """A transfer to its end at the receiver."""
        leg = LegKey("r", 0)
        self.ends[DECODE].open_receiver(Incoming(X, leg, PREFILL, 0, target, deadline=60.0), self.now)
        self.ends[PREFILL].open_sender(leg, DECODE, "here", 60.0, self.now)
        self.ends[PREFILL].blocks_computed(leg, source, {}, self.now)
        self.ends[PREFILL].token_drawn(leg, 42, None, self.now)
        for turn in range(30_000):
            on_turn(turn)
            mail, self._mail = self._mail, []
            for sender, peer, message in mail:
                self.ends[peer].on_message(sender, message, self.now)
            for end in self.ends.values():
                end.tick(self.now)
            if events := self.ends[DECODE].events:
                return events
            self.now += 0.001
        raise AssertionError("nothing more happens")


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 4)], ids=str)
def test_a_transfer_arrives_though_a_piece_was_damaged(rig: Rig, sizes: tuple[int, int]) -> None:
    """Guards the protocol over ranks: chunks, one retry of what arrived wrong, and the digest of all units."""
    damaged: list[bytes] = []

    def script(movement):  # type: ignore[no-untyped-def]
        if not damaged:
            damaged.append(movement.key.transfer_id)
            return Fate(Outcome.CORRUPT)
        return Fate(after_polls=2)

    rig.fabric.script = script
    sender, receiver = rig.group(PREFILL, sizes[0]), rig.group(DECODE, sizes[1])
    sender.fill(1)
    source, target = [8, 1, 2, 3, 6], (0, 1, 5, 4, 3)
    events = Exchanges(rig.groups).run(source, target, lambda turn: None)
    assert damaged and [type(event) for event in events] == [KvArrived]
    assert receiver.pools.digests([target]) == sender.pools.digests([source])


def test_a_rank_that_is_lost_in_mid_transfer_ends_it(rig: Rig) -> None:
    """Guards against a decode group that waits for ever for the pieces of one rank, and blocks that stay in use."""
    rig.group(PREFILL, 2)
    receiver = rig.group(DECODE, 4)
    rig.fabric.script = lambda movement: Fate(after_polls=20)

    def on_turn(turn: int) -> None:
        if turn == 10:
            rig.fabric.leave(rank_name(PREFILL, 1))

    events = Exchanges(rig.groups).run([8, 1, 2, 3, 6], (0, 1, 5, 4, 3), on_turn)
    assert [type(event) for event in events] == [ReceiverEnded]
    assert receiver.plane.idle(X)
