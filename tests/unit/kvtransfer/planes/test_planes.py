"""The contract of every data plane: bytes arrive bit for bit in the posted blocks, or not at all.

A plane that passes these tests works with the transfer protocol. Properties of a single plane are tested beside it.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey, IoDone, Plane
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import PIECE_BYTES, ZmqPlane
from baton.kvtransfer.reshard import Cut
from baton.node.credentials import Credentials
from baton.node.errors import InvariantBroken
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context
from baton.testing.loopback import LoopbackFabric

PATIENCE_S = 60.0
SENDER, RECEIVER, OTHER = "prefill/1", "decode/1", "prefill/2"
X, Y, Z = b"x" * 16, b"y" * 16, b"z" * 16


@dataclass
class End:
    name: str
    plane: Plane
    memory: HostMemory

    def content(self, blocks: list[int]) -> bytes:
        return b"".join(bytes(self.memory.block(index)) for index in blocks)


class Rig:
    """Two or more ends of one kind of plane, each with its own filled memory."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.context = Context(Credentials("decode"))
        self.fabric = LoopbackFabric()
        self.ends: list[End] = []
        self.done: dict[str, list[IoDone]] = {}

    def end(self, name: str, num_blocks: int = 12, block_bytes: int = 4099) -> End:
        memory = HostMemory(num_blocks, block_bytes)
        memory.view[:] = random.Random(name).randbytes(num_blocks * block_bytes)
        end = End(name, self._plane(name, memory), memory)
        for other in self.ends:
            other.plane.connect(name, end.plane.describe())
            end.plane.connect(other.name, other.plane.describe())
        self.ends.append(end)
        self.done[name] = []
        return end

    def _plane(self, name: str, memory: HostMemory) -> Plane:
        if self.kind == "zmq":
            return ZmqPlane(self.context, memory, name)
        if self.kind == "sharded":
            return ShardedPlane(Cut.even(1, 1, 1), memory.num_blocks, [self.fabric.plane(rank_name(name, 0), memory)])
        return ShmPlane(memory) if self.kind == "shm" else self.fabric.plane(name, memory)

    def turn(self) -> None:
        """Poll every end once; wait briefly for planes that use kernel sockets."""
        for end in self.ends:
            for socket in end.plane.sockets():
                socket.poll(2)  # type: ignore[attr-defined]
            self.done[end.name] += end.plane.poll()

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"still not so after {PATIENCE_S} s: {self.done}"
            self.turn()

    def received(self, end: End, ok: bool = True) -> set[ChunkKey]:
        return {done.key for done in self.done[end.name] if not done.sending and done.ok is ok}

    def sent(self, end: End, ok: bool = True) -> set[ChunkKey]:
        return {done.key for done in self.done[end.name] if done.sending and done.ok is ok}

    def move(self, sender: End, receiver: End, key: ChunkKey, source: list[int], blocks: list[int]) -> None:
        """Post both sides as the protocol does, the receive first."""
        receiver.plane.post_receive(sender.name, key, source, blocks)
        sender.plane.post_send(receiver.name, key, source)

    def close(self) -> None:
        for end in self.ends:
            end.plane.close()
            end.plane.close()
            end.memory.close()
        self.context.close()


PLANES = [
    "loopback",
    "sharded",
    "zmq",
    pytest.param("shm", marks=pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux")),
]


@pytest.fixture(params=PLANES)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.close()


@pytest.fixture(params=["loopback", "zmq"])
def two_sided(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.close()


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("block_bytes", [1, 4096, 70_001])
def test_bytes_arrive_bit_for_bit_and_nowhere_else(rig: Rig, size: int, block_bytes: int) -> None:
    sender, receiver = rig.end(SENDER, 12, block_bytes), rig.end(RECEIVER, 12, block_bytes)
    order = random.Random(size)
    source, blocks = order.sample(range(12), size), order.sample(range(12), size)
    others = [block for block in range(12) if block not in blocks]
    before, sent_from = receiver.content(others), sender.content(list(range(12)))
    rig.move(sender, receiver, ChunkKey(X, 0, 0), source, blocks)
    rig.until(lambda: len(rig.received(receiver)) == len(rig.sent(sender)) == 1)
    assert receiver.content(blocks) == sender.content(source)
    assert receiver.content(others) == before and sender.content(list(range(12))) == sent_from
    assert sender.plane.idle(X) and receiver.plane.idle(X)


def test_a_block_larger_than_a_piece_arrives_intact(rig: Rig) -> None:
    sender, receiver = rig.end(SENDER, 3, PIECE_BYTES + 5), rig.end(RECEIVER, 3, PIECE_BYTES + 5)
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [2, 0], [0, 1])
    rig.until(lambda: len(rig.received(receiver)) == len(rig.sent(sender)) == 1)
    assert receiver.content([0, 1]) == sender.content([2, 0])


def test_several_transfers_interleave(rig: Rig) -> None:
    """Guards against mixing chunks of different transfers, sequence numbers and directions on a connection."""
    one, other = rig.end(SENDER), rig.end(RECEIVER)
    expected: list[tuple[End, list[int], bytes]] = []
    forward, backward = iter(range(6)), iter(range(6, 12))
    for seq in range(3):
        for transfer_id, (sender, receiver, free) in ((X, (one, other, forward)), (Y, (one, other, forward))):
            target = next(free)
            rig.move(sender, receiver, ChunkKey(transfer_id, seq, 0), [seq + (transfer_id == Y) * 3], [target])
            expected.append((receiver, [target], sender.content([seq + (transfer_id == Y) * 3])))
        target = next(backward)
        rig.move(other, one, ChunkKey(Z, seq, 0), [11 - seq], [target])
        expected.append((one, [target], other.content([11 - seq])))
    rig.until(lambda: len(rig.received(other)) == 6 and len(rig.received(one)) == 3)
    for end, blocks, content in expected:
        assert end.content(blocks) == content
    assert not rig.received(one, ok=False) and not rig.received(other, ok=False)


def test_a_receive_is_reported_once(rig: Rig) -> None:
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    for seq in range(4):
        rig.move(sender, receiver, ChunkKey(X, seq, 0), [seq], [seq])
    rig.until(lambda: len(rig.received(receiver)) == 4)
    rig.turn()
    assert len([done for done in rig.done[RECEIVER] if not done.sending]) == 4


def test_a_cancelled_transfer_is_not_reported_and_soon_idle(rig: Rig) -> None:
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [0, 1], [0, 1])
    receiver.plane.cancel(X)
    sender.plane.cancel(X)
    rig.until(lambda: receiver.plane.idle(X) and sender.plane.idle(X))
    rig.move(sender, receiver, ChunkKey(Y, 0, 0), [3], [3])
    rig.until(lambda: bool(rig.received(receiver)))
    assert rig.received(receiver) == {ChunkKey(Y, 0, 0)}
    assert all(done.key.transfer_id == Y for done in rig.done[SENDER] + rig.done[RECEIVER])


def test_a_receive_that_is_never_sent_can_be_cancelled(two_sided: Rig) -> None:
    """Guards against leaked blocks, which stay in quarantine until `idle`."""
    two_sided.end(SENDER)
    receiver = two_sided.end(RECEIVER)
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [0], [0])
    two_sided.turn()
    assert not receiver.plane.idle(X)
    receiver.plane.cancel(X)
    assert receiver.plane.idle(X)
    two_sided.turn()
    assert two_sided.done[RECEIVER] == []


def test_late_data_of_a_cancelled_transfer_is_ignored(two_sided: Rig) -> None:
    """Guards the blocks, which may belong to another sequence by then."""
    sender, receiver = two_sided.end(SENDER), two_sided.end(RECEIVER)
    before = receiver.content([0])
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [5], [0])
    receiver.plane.cancel(X)
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [5])
    two_sided.until(lambda: receiver.plane.dropped["unknown"] == 1)  # type: ignore[attr-defined]
    assert receiver.content([0]) == before and two_sided.done[RECEIVER] == []


def test_late_data_of_an_old_retry_is_ignored(two_sided: Rig) -> None:
    sender, receiver = two_sided.end(SENDER), two_sided.end(RECEIVER)
    before = receiver.content([0])
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 1), [5], [0])
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [5])
    two_sided.until(lambda: receiver.plane.dropped["unknown"] == 1)  # type: ignore[attr-defined]
    assert receiver.content([0]) == before and not receiver.plane.idle(X)
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 1), [5])
    two_sided.until(lambda: two_sided.received(receiver) == {ChunkKey(X, 0, 1)})
    assert receiver.content([0]) == sender.content([5])


def test_another_peer_cannot_fill_a_posted_receive(two_sided: Rig) -> None:
    two_sided.end(SENDER)
    other, receiver = two_sided.end(OTHER), two_sided.end(RECEIVER)
    before = receiver.content([0])
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [5], [0])
    other.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [5])
    two_sided.until(lambda: receiver.plane.dropped["wrong_peer"] == 1)  # type: ignore[attr-defined]
    assert receiver.content([0]) == before and not two_sided.done[RECEIVER]


@pytest.mark.parametrize("num_sent", [1, 3])
def test_a_chunk_of_another_length_is_not_written(two_sided: Rig, num_sent: int) -> None:
    sender, receiver = two_sided.end(SENDER), two_sided.end(RECEIVER)
    before = receiver.content([0, 1])
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [5, 6], [0, 1])
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), list(range(num_sent)))
    two_sided.until(lambda: receiver.plane.dropped["size"] == 1)  # type: ignore[attr-defined]
    assert receiver.content([0, 1]) == before and not two_sided.done[RECEIVER]


def test_blocks_of_another_size_are_not_written(two_sided: Rig) -> None:
    sender, receiver = two_sided.end(SENDER, 12, 64), two_sided.end(RECEIVER, 12, 32)
    before = receiver.content([0, 1])
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [5, 6], [0, 1])
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [5])
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [5, 6])
    two_sided.until(lambda: receiver.plane.dropped["size"] == 2)  # type: ignore[attr-defined]
    assert receiver.content([0, 1]) == before and not two_sided.done[RECEIVER]


def test_forgetting_a_peer_fails_only_its_operations(two_sided: Rig) -> None:
    sender, other, receiver = two_sided.end(SENDER), two_sided.end(OTHER), two_sided.end(RECEIVER)
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [0], [0])
    receiver.plane.post_receive(OTHER, ChunkKey(Y, 0, 0), [1], [1])
    receiver.plane.forget(SENDER)
    two_sided.until(lambda: two_sided.received(receiver, ok=False) == {ChunkKey(X, 0, 0)})
    assert receiver.plane.idle(X)
    other.plane.post_send(RECEIVER, ChunkKey(Y, 0, 0), [1])
    two_sided.until(lambda: two_sided.received(receiver) == {ChunkKey(Y, 0, 0)})
    sender.plane.forget("never heard of")


def test_a_forgotten_peer_can_be_connected_again(rig: Rig) -> None:
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [0], [0])
    rig.until(lambda: bool(rig.received(receiver)))
    for end, peer in ((sender, receiver), (receiver, sender)):
        end.plane.forget(peer.name)
        end.plane.connect(peer.name, peer.plane.describe())
    rig.move(sender, receiver, ChunkKey(Y, 0, 0), [1], [1])
    rig.until(lambda: ChunkKey(Y, 0, 0) in rig.received(receiver))
    assert receiver.content([0, 1]) == sender.content([0, 1])


def test_without_a_connection_an_operation_fails_and_does_not_hang(rig: Rig) -> None:
    end = rig.end(SENDER)
    if end.plane.pulls:
        end.plane.post_receive("nobody/1", ChunkKey(X, 0, 0), [0], [0])
    else:
        end.plane.post_send("nobody/1", ChunkKey(X, 0, 0), [0])
    rig.turn()
    assert [(done.key, done.ok) for done in rig.done[SENDER]] == [(ChunkKey(X, 0, 0), False)]
    assert end.plane.idle(X)


def test_connecting_again_changes_nothing(rig: Rig) -> None:
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), [0], [0])
    sender.plane.connect(RECEIVER, receiver.plane.describe())
    receiver.plane.connect(SENDER, sender.plane.describe())
    sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [0])
    sender.plane.connect(RECEIVER, receiver.plane.describe())
    rig.until(lambda: rig.received(receiver) == {ChunkKey(X, 0, 0)})


@pytest.mark.parametrize(
    ("source", "blocks"), [([], []), ([0], [0, 1]), ([0, 1], [0]), ([0], [12]), ([0], [-1])]
)  # fmt: skip
def test_an_impossible_receive_is_a_bug(rig: Rig, source: list[int], blocks: list[int]) -> None:
    rig.end(SENDER)
    receiver = rig.end(RECEIVER)
    with pytest.raises(InvariantBroken):
        receiver.plane.post_receive(SENDER, ChunkKey(X, 0, 0), source, blocks)
    assert receiver.plane.idle(X)


@pytest.mark.parametrize("blocks", [[], [12], [-1]])
def test_an_impossible_send_is_a_bug(rig: Rig, blocks: list[int]) -> None:
    sender = rig.end(SENDER)
    rig.end(RECEIVER)
    with pytest.raises(InvariantBroken):
        sender.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), blocks)
    assert sender.plane.idle(X)


def test_ends_reach_each_other_by_their_descriptions(rig: Rig) -> None:
    one, other = rig.end(SENDER), rig.end(RECEIVER)
    assert one.plane.reaches(other.plane.describe()) and other.plane.reaches(one.plane.describe())
    address = other.plane.describe()
    wrong = PlaneAddress(plane="something else", host=address.host, address=address.address)
    assert not one.plane.reaches(wrong)


@pytest.mark.parametrize("text", ["", "x", "ipc:///tmp/x", "1:2:3:4", "tcp://*:1", "0:0:0:" + "0" * 32, "\0", "tcp://"])
def test_an_invalid_address_is_not_reached_and_raises_nothing(rig: Rig, text: str) -> None:
    """Guards against exceptions, or opened resources, caused by a peer's address text."""
    end = rig.end(SENDER)
    nonsense = PlaneAddress(plane=end.plane.name, host=end.plane.describe().host, address=text)
    assert not end.plane.reaches(nonsense)
    end.plane.connect(RECEIVER, nonsense)
    end.plane.post_send(RECEIVER, ChunkKey(X, 0, 0), [0])
    end.plane.cancel(X)
    rig.until(lambda: end.plane.idle(X))
    end.plane.forget(RECEIVER)


@pytest.mark.parametrize("kind", PLANES[2:])
def test_a_peer_with_a_new_address_is_used_there(kind: str) -> None:
    """Guards against stale blocks from memory that is still mapped or a socket that is still connected."""
    rig = Rig(kind)
    old, new, receiver = rig.end(SENDER), rig.end(OTHER), rig.end(RECEIVER)
    rig.move(old, receiver, ChunkKey(X, 0, 0), [0], [0])
    rig.until(lambda: bool(rig.received(receiver)))
    if receiver.plane.pulls:
        receiver.plane.connect(SENDER, new.plane.describe())
        receiver.plane.post_receive(SENDER, ChunkKey(Y, 0, 0), [0], [1])
    else:  # here the sender's address book decides: the old identity now leads to `new`
        old.plane.connect(RECEIVER, new.plane.describe())
        new.plane.post_receive(SENDER, ChunkKey(Y, 0, 0), [0], [1])
        old.plane.post_send(RECEIVER, ChunkKey(Y, 0, 0), [0])
    target, source = (receiver, new) if receiver.plane.pulls else (new, old)
    rig.until(lambda: ChunkKey(Y, 0, 0) in rig.received(target))
    assert target.content([1]) == source.content([0])
    rig.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
@pytest.mark.parametrize("kind", PLANES)
def test_close_leaves_no_descriptor_no_mapping_and_no_thread(kind: str) -> None:
    def held() -> tuple[int, int, int]:
        gc.collect()
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), maps.read().count("baton-kv"), threading.active_count()

    def live(finish: bool) -> None:
        rig = Rig(kind)
        sender, receiver = rig.end(SENDER, 12, 100_000), rig.end(RECEIVER, 12, 100_000)
        rig.move(sender, receiver, ChunkKey(X, 0, 0), [0, 1], [0, 1])
        if finish:
            rig.until(lambda: bool(rig.received(receiver)))
        receiver.plane.post_receive(SENDER, ChunkKey(Y, 0, 0), [0], [0])
        rig.close()

    live(True)  # pyzmq keeps a thread and a context after the first zero-copy message
    before = held()
    live(True)
    live(False)
    deadline = time.monotonic() + PATIENCE_S
    while held() != before:  # libzmq frees memory in its own thread
        assert time.monotonic() < deadline, (before, held())
