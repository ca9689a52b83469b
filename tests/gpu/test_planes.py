"""Guards the planes `cuda_ipc` and `nccl` between processes on two GPUs: the contract of every plane, the sudden death
of a peer in mid-transfer, and unchanged digests of all moved bytes."""

from __future__ import annotations

import base64
import importlib.util
import json
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from baton.kvtransfer.planes.base import ChunkKey, IoDone
from baton.node.errors import InvariantBroken
from baton.node.messages.transfer import PlaneAddress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(90),
]
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("gpu_contract", ROOT / "tests/unit/kvtransfer/planes/test_planes.py")
assert _spec is not None and _spec.loader is not None
contract = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = contract
_spec.loader.exec_module(contract)
SENDER, RECEIVER, OTHER, X, Y = contract.SENDER, contract.RECEIVER, contract.OTHER, contract.X, contract.Y
REPLACEMENT = "prefill/3"
"""A new process in place of a dead one: as workers do, it has a name that no process had before."""
GPU_OF = {SENDER: 0, RECEIVER: 1, OTHER: 0, REPLACEMENT: 0}
MIB = 1 << 20

test_bytes_arrive = contract.test_bytes_arrive_bit_for_bit_and_nowhere_else
test_several_transfers_interleave = contract.test_several_transfers_interleave
test_a_receive_is_reported_once = contract.test_a_receive_is_reported_once
test_a_cancelled_transfer = contract.test_a_cancelled_transfer_is_not_reported_and_soon_idle
test_a_receive_that_is_never_sent = contract.test_a_receive_that_is_never_sent_can_be_cancelled
test_late_data = contract.test_late_data_of_a_cancelled_transfer_is_ignored
test_late_retry = contract.test_late_data_of_an_old_retry_is_ignored
test_another_peer = contract.test_another_peer_cannot_fill_a_posted_receive
test_another_length = contract.test_a_chunk_of_another_length_is_not_written
test_forgetting = contract.test_forgetting_a_peer_fails_only_its_operations
test_connected_anew = contract.test_a_forgotten_peer_can_be_connected_again
test_without_a_connection = contract.test_without_a_connection_an_operation_fails_and_does_not_hang
test_connecting_again = contract.test_connecting_again_changes_nothing
test_impossible_receive = contract.test_an_impossible_receive_is_a_bug
test_impossible_send = contract.test_an_impossible_send_is_a_bug
test_descriptions = contract.test_ends_reach_each_other_by_their_descriptions
test_nonsense = contract.test_an_invalid_address_is_not_reached_and_raises_nothing


class Child:
    """device_end.py on one GPU, with bounded waits."""

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("device_end.py")), str(gpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, method: str, *arguments: object) -> object:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 40.0)
        assert ready, f"{method} does not return"
        kind, value = json.loads(self.process.stdout.readline() or b'["died", ""]')
        if kind == "InvariantBroken":
            raise InvariantBroken(value)
        assert kind == "ok", (method, kind, value)
        return value

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)
        self.process.stdout.close()


class RemotePlane:
    """A plane in a child, with the methods that the contract calls."""

    def __init__(self, child: Child, kind: str) -> None:
        self.child = child
        self.name = kind
        self.pulls = kind == "cuda_ipc"

    def describe(self) -> PlaneAddress:
        plane, host, address = self.child("describe")  # type: ignore[misc]
        return PlaneAddress(plane=plane, host=host, address=address)

    def reaches(self, peer: PlaneAddress) -> bool:
        return bool(self.child("reaches", [peer.plane, peer.host, peer.address]))

    def connect(self, peer: str, address: PlaneAddress) -> None:
        self.child("connect", peer, [address.plane, address.host, address.address])

    def post_send(self, peer: str, key: ChunkKey, blocks: Sequence[int]) -> None:
        self.child("post_send", peer, _plain(key), list(blocks))

    def post_receive(self, peer: str, key: ChunkKey, source: Sequence[int], blocks: Sequence[int]) -> None:
        self.child("post_receive", peer, _plain(key), list(source), list(blocks))

    def poll(self) -> list[IoDone]:
        rows: list[list] = self.child("poll")  # type: ignore[assignment]
        return [IoDone(ChunkKey(r[0].encode(), r[1], r[2]), r[3], r[4], r[5], bytes.fromhex(r[6])) for r in rows]

    def cancel(self, transfer_id: bytes) -> None:
        self.child("cancel", transfer_id.decode())

    def idle(self, transfer_id: bytes) -> bool:
        return bool(self.child("idle", transfer_id.decode()))

    def forget(self, peer: str) -> None:
        self.child("forget", peer)

    @property
    def dropped(self) -> Counter[str]:
        return Counter(self.child("dropped"))

    def sockets(self) -> list[object]:
        return []

    def close(self) -> None:
        self.child("close")


def _plain(key: ChunkKey) -> list[object]:
    return [key.transfer_id.decode(), key.seq, key.retry]


class RemoteEnd:
    def __init__(self, name: str, child: Child, kind: str) -> None:
        self.name = name
        self.child = child
        self.plane = RemotePlane(child, kind)

    def content(self, blocks: list[int]) -> bytes:
        return base64.b64decode(str(self.child("content", blocks)))

    def digest(self, blocks: list[int]) -> str:
        return str(self.child("digest", blocks))


class GpuRig(contract.Rig):
    """Ends in separate processes, which are kept for all tests."""

    def __init__(self, kind: str, children: dict[str, Child]) -> None:
        super().__init__(kind)
        self.children = children

    def end(self, name: str, num_blocks: int = 12, block_bytes: int = 4099) -> RemoteEnd:
        if name not in self.children or self.children[name].process.poll() is not None:
            self.children[name] = Child(GPU_OF[name])
        child = self.children[name]
        child("make", [self.kind], name, num_blocks, block_bytes)
        end = RemoteEnd(name, child, self.kind)
        for other in self.ends:
            other.plane.connect(name, end.plane.describe())
            end.plane.connect(other.name, other.plane.describe())
        self.ends.append(end)
        self.done[name] = []
        return end

    def leave(self, end: RemoteEnd) -> None:
        """Kill the process of an end."""
        self.ends.remove(end)
        end.child.process.wait(15)

    def close(self) -> None:
        for end in self.ends:
            if end.child.process.poll() is None:
                end.plane.close()
        self.context.close()


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, Child]]:
    children: dict[str, Child] = {}
    yield children
    for child in children.values():
        child.end()


@pytest.fixture(params=["cuda_ipc", "nccl"])
def rig(request: pytest.FixtureRequest, children: dict[str, Child]) -> Iterator[GpuRig]:
    rig = GpuRig(request.param, children)
    yield rig
    rig.close()


@pytest.fixture
def two_sided(children: dict[str, Child]) -> Iterator[GpuRig]:
    rig = GpuRig("nccl", children)
    yield rig
    rig.close()


@pytest.mark.parametrize("block_mib", [1, 8])
def test_large_chunks_keep_their_digest(rig: GpuRig, block_mib: int) -> None:
    """A whole pool, in consecutive and in scattered blocks, with several chunks in flight."""
    sender, receiver = rig.end(SENDER, 64, block_mib * MIB), rig.end(RECEIVER, 64, block_mib * MIB)
    chunks = [
        ([*range(16)], [*range(16)]),
        ([*range(16, 32)], [*range(31, 15, -1)]),
        ([63, 40, 41, 42], [50, 51, 52, 63]),
    ]
    for seq, (source, blocks) in enumerate(chunks):
        rig.move(sender, receiver, ChunkKey(X, seq, 0), source, blocks)
    rig.until(lambda: len(rig.received(receiver)) == len(chunks))
    found = {done.key.seq: done.digest.hex() for done in rig.done[RECEIVER]}
    for seq, (source, blocks) in enumerate(chunks):
        assert receiver.digest(blocks) == sender.digest(source)
        assert found[seq] == (sender.digest(source) if receiver.plane.pulls else "")  # made on the way
    receiver.child("flip", 50, 1234)
    assert receiver.digest([50]) != sender.digest([63])


@pytest.mark.parametrize("scales", ["none", "token"])
@pytest.mark.parametrize(
    ("sends", "receives"),
    [
        ((2, 1, [0, 0]), (1, 1, [1])),
        ((2, 1, [0, 1]), (1, 1, [1])),
        ((2, 1, [0, 1]), (1, 2, [0, 1])),
        ((3, 1, [0, 1, 0]), (1, 2, [1, 1])),
        ((2, 2, [0, 0, 1, 1]), (1, 1, [1])),
    ],
    ids=str,
)
def test_stages_hand_their_layers_over(
    children: dict[str, Child], sends: tuple[int, int, list[int]], receives: tuple[int, int, list[int]], scales: str
) -> None:
    """Guards against rows at the distance of the other end's padding, and sums in the order of stages: 10 layers have
    padding, in two stages each of them has, in three none."""
    for name in (SENDER, RECEIVER):
        if name not in children or children[name].process.poll() is not None:
            children[name] = Child(GPU_OF[name])
    sender, receiver = children[SENDER], children[RECEIVER]
    sender("make_stages", SENDER, *sends, scales)
    receiver("make_stages", RECEIVER, *receives, scales)
    planes = {name: RemotePlane(children[name], "cuda_ipc_layers") for name in (SENDER, RECEIVER)}
    assert planes[RECEIVER].reaches(planes[SENDER].describe())
    planes[RECEIVER].connect(SENDER, planes[SENDER].describe())
    planes[SENDER].connect(RECEIVER, planes[RECEIVER].describe())
    before: list[str] = receiver("layers", list(range(12)))  # type: ignore[assignment]
    chunks = [([0, 1, 2, 3], [4, 5, 6, 7]), ([9, 5, 6], [0, 11, 2])]
    for seq, (source, target) in enumerate(chunks):
        planes[RECEIVER].post_receive(SENDER, ChunkKey(X, seq, 0), source, target)
        planes[SENDER].post_send(RECEIVER, ChunkKey(X, seq, 0), source)
    digests: dict[int, str] = {}
    until = time.monotonic() + 30
    while len(digests) < len(chunks):
        for done in planes[RECEIVER].poll():
            assert done.ok, done.reason
            digests[done.key.seq] = done.digest.hex()
        assert time.monotonic() < until
    for seq, (source, target) in enumerate(chunks):
        assert receiver("layers", target) == sender("layers", source)
        assert digests[seq] == sender("layers_digest", source) == receiver("layers_digest", target)
    others = [1, 3, 8, 9, 10]
    assert receiver("layers", others) == [before[block] for block in others]
    for plane in planes.values():
        plane.close()


def test_the_pool_of_a_dead_owner_is_unmapped(children: dict[str, Child]) -> None:
    """Guards against stale memory: a mapping outlives its owner, and after `forget` a new owner's memory is read."""
    rig = GpuRig("cuda_ipc", children)
    sender, receiver = rig.end(SENDER, 12, MIB), rig.end(RECEIVER, 12, MIB)
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [3], [3])
    rig.until(lambda: bool(rig.received(receiver)))
    sender.child.process.send_signal(signal.SIGKILL)
    rig.leave(sender)
    receiver.plane.forget(SENDER)
    rig.until(lambda: receiver.plane.idle(X))
    again = rig.end(SENDER, 12, MIB)
    again.child("flip", 3, 0)
    rig.move(again, receiver, ChunkKey(Y, 0, 0), [3], [4])
    rig.until(lambda: ChunkKey(Y, 0, 0) in rig.received(receiver))
    assert receiver.digest([4]) == again.digest([3])
    rig.close()


def until_receive_is_issued(rig: GpuRig, sender: RemoteEnd, receiver: RemoteEnd) -> None:
    """Wait until the receiver has issued its receive and sent Go, which the sender never reads."""
    rig.move(sender, receiver, ChunkKey(Y, 0, 0), [0], [0])
    rig.until(lambda: ChunkKey(Y, 0, 0) in rig.received(receiver) and ChunkKey(Y, 0, 0) in rig.sent(sender))
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [1, 2], [1, 2])
    for _ in range(20):
        receiver.plane.poll()
        time.sleep(0.01)


@pytest.fixture
def crowd(two_sided: GpuRig) -> Iterator[tuple[GpuRig, RemoteEnd, RemoteEnd, RemoteEnd]]:
    """A sender that will be killed, another one, and their receiver, with open connections."""
    sender, other, receiver = (two_sided.end(name, 12, MIB) for name in (SENDER, OTHER, RECEIVER))
    two_sided.move(other, receiver, ChunkKey(Y, 9, 0), [9], [9])
    two_sided.until(lambda: ChunkKey(Y, 9, 0) in two_sided.received(receiver))
    yield two_sided, sender, other, receiver
    sender.child.process.kill()  # also if it is frozen
    sender.child.process.wait(15)


@pytest.mark.parametrize("how", ["killed", "killed-and-forgotten", "frozen"])
def test_a_peer_that_dies_in_mid_transfer_frees_the_survivor(
    crowd: tuple[GpuRig, RemoteEnd, RemoteEnd, RemoteEnd], how: str
) -> None:
    """Guards against a receive kernel that spins for a dead peer: blocks and GPU are freed in time."""
    rig, sender, other, receiver = crowd
    until_receive_is_issued(rig, sender, receiver)
    sender.child.process.send_signal(signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
    died_at = time.monotonic()
    rig.ends.remove(sender)
    if how == "killed-and-forgotten":
        receiver.plane.forget(SENDER)
    receiver.plane.cancel(X)
    assert not receiver.plane.idle(X)

    rig.move(other, receiver, ChunkKey(Y, 10, 0), [10], [10])
    rig.until(lambda: ChunkKey(Y, 10, 0) in rig.received(receiver))
    other_s = time.monotonic() - died_at
    assert receiver.digest([10]) == other.digest([10])

    rig.until(lambda: receiver.plane.idle(X))
    free_s = time.monotonic() - died_at
    print(f"{how}: another peer served after {other_s:.2f} s, free after {free_s:.2f} s", flush=True)

    sender.child.process.kill()
    sender.child.process.wait(15)
    receiver.plane.forget(SENDER)
    again = rig.end(REPLACEMENT, 12, MIB)
    begin = time.monotonic()
    rig.move(again, receiver, ChunkKey(Y, 11, 0), [5, 6], [1, 2])
    rig.until(lambda: ChunkKey(Y, 11, 0) in rig.received(receiver))
    print(f"{how}: paired again and moved in {time.monotonic() - begin:.2f} s", flush=True)
    assert receiver.digest([1, 2]) == again.digest([5, 6])


def test_a_sender_killed_while_bytes_flow(two_sided: GpuRig) -> None:
    """Guards the survivor: it is freed, and data that it then receives from a new process is correct."""
    rig = two_sided
    sender, receiver = rig.end(SENDER, 64, 16 * MIB), rig.end(RECEIVER, 64, 16 * MIB)
    rig.move(sender, receiver, ChunkKey(Y, 0, 0), [0], [0])
    rig.until(lambda: bool(rig.received(receiver)) and bool(rig.sent(sender)))
    for seq in range(100):
        rig.move(sender, receiver, ChunkKey(X, seq, 0), list(range(64)), list(range(64)))
    for _ in range(3):
        rig.turn()
    sender.child.process.send_signal(signal.SIGKILL)
    rig.leave(sender)
    died_at = time.monotonic()
    receiver.plane.cancel(X)
    rig.until(lambda: receiver.plane.idle(X))
    free_s = time.monotonic() - died_at
    print(f"killed under load: free after {free_s:.2f} s", flush=True)
    receiver.plane.forget(SENDER)
    again = rig.end(REPLACEMENT, 64, 16 * MIB)
    rig.move(again, receiver, ChunkKey(Y, 1, 0), list(range(64)), list(range(64)))
    rig.until(lambda: ChunkKey(Y, 1, 0) in rig.received(receiver))
    assert receiver.digest(list(range(64))) == again.digest(list(range(64)))


def test_the_preferred_plane_is_chosen(children: dict[str, Child]) -> None:
    """The copy engine is preferred to NCCL, which is used if it is the only one offered."""
    for name in (SENDER, RECEIVER):
        if name not in children or children[name].process.poll() is not None:
            children[name] = Child(GPU_OF[name])
    children[SENDER]("make", ["cuda_ipc", "nccl"], SENDER, 4, MIB)
    children[RECEIVER]("make", ["cuda_ipc", "nccl"], RECEIVER, 4, MIB)
    offered: list = children[SENDER]("describe_all")  # type: ignore[assignment]
    assert children[RECEIVER]("choose", offered) == "cuda_ipc"
    assert children[RECEIVER]("choose", offered[1:]) == "nccl"
    assert children[RECEIVER]("choose", [["cuda_ipc", "elsewhere", offered[0][2]]]) is None
    for name in (SENDER, RECEIVER):
        children[name]("close")


def test_planes_free_their_memory(rig: GpuRig) -> None:
    """Guards against leaking the 130 MiB of each communicator as pairs come and go. The first may keep some."""
    free: list[float] = []
    for number in range(3):
        sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
        rig.move(sender, receiver, ChunkKey(X, number, 0), [0], [0])
        rig.until(lambda number=number: ChunkKey(X, number, 0) in rig.received(rig.ends[-1]))
        for end in rig.ends:
            end.plane.close()
        free.append(float(str(receiver.child("gib_free"))))
        rig.ends.clear()
    assert free[-1] > free[0] - 0.01, free
