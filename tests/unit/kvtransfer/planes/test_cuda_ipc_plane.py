"""Guards the plane `cuda_ipc` on CPU, over a scripted copy engine: the contract of every plane, and that no transfer is
idle, and no mapping is closed, while a copy may still run."""

from __future__ import annotations

import importlib.util
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.blocks.runs import BlockRun, RowSpacing, evenly_spaced
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.kvtransfer.planes.cuda_ipc import CudaIpcPlane, Exported
from baton.kvtransfer.planes.sharded import ShardedPlane
from baton.kvtransfer.reshard import Cut
from baton.node.errors import PeerLost

_spec = importlib.util.spec_from_file_location("cuda_ipc_contract", Path(__file__).with_name("test_planes.py"))
assert _spec is not None and _spec.loader is not None
contract = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = contract
_spec.loader.exec_module(contract)
SENDER, RECEIVER, OTHER, X, Y = contract.SENDER, contract.RECEIVER, contract.OTHER, contract.X, contract.Y

test_bytes_arrive = contract.test_bytes_arrive_bit_for_bit_and_nowhere_else
test_several_transfers_interleave = contract.test_several_transfers_interleave
test_a_receive_is_reported_once = contract.test_a_receive_is_reported_once
test_a_cancelled_transfer = contract.test_a_cancelled_transfer_is_not_reported_and_soon_idle
test_connected_anew = contract.test_a_forgotten_peer_can_be_connected_again
test_without_a_connection = contract.test_without_a_connection_an_operation_fails_and_does_not_hang
test_connecting_again = contract.test_connecting_again_changes_nothing
test_impossible_receive = contract.test_an_impossible_receive_is_a_bug
test_impossible_send = contract.test_an_impossible_send_is_a_bug
test_descriptions = contract.test_ends_reach_each_other_by_their_descriptions
test_nonsense = contract.test_an_invalid_address_is_not_reached_and_raises_nothing


class FakeEngine:
    """A fake driver with exported memories by handle. A copy happens when it is polled while `slow` is off."""

    def __init__(self, memory: HostMemory, driver: dict[bytes, HostMemory], rows: RowSpacing | None = None) -> None:
        self.memory, self.driver = memory, driver
        self.rows = rows or RowSpacing.even(memory.block_bytes)
        size_bytes = memory.num_blocks * memory.block_bytes
        self.num_blocks = self.rows.num_rows(size_bytes)
        self.slow = False
        self.broken = False
        self.opened: dict[int, HostMemory] = {}
        self.opens = 0
        self.copies: dict[int, tuple[int, list[BlockRun]]] = {}
        self._exported = Exported(secrets.token_bytes(64), size_bytes, secrets.token_bytes(16), "ab" * 16, self.rows)
        driver[self._exported.handle] = memory

    def export(self) -> Exported:
        return self._exported

    def open(self, exported: Exported) -> int:
        if exported.handle not in self.driver:
            raise PeerLost("no such memory")
        self.opens += 1
        self.opened[self.opens] = self.driver[exported.handle]
        return self.opens

    def close(self, pointer: int) -> None:
        assert not any(source == pointer for source, _ in self.copies.values()), "closed under a copy"
        del self.opened[pointer]

    def pull(self, pointer: int, runs: Sequence[BlockRun], blocks: Sequence[int]) -> int:
        assert sum(run.length for run in runs) == len(blocks) * self.rows.row_bytes
        self.copies[number := max(self.copies, default=0) + 1] = (pointer, list(runs))
        return number

    def ended(self, copy: int) -> bytes | None:
        if self.slow:
            return None
        pointer, runs = self.copies.pop(copy)
        if self.broken:
            raise PeerLost("the copy failed")
        for source, target, length in runs:
            self.memory.view[target : target + length] = self.opened[pointer].view[source : source + length]
        return b"sums of copy %d" % copy

    def shut(self) -> None:
        self.copies.clear()
        self.opened.clear()


class IpcRig(contract.Rig):
    def __init__(self) -> None:
        super().__init__("cuda_ipc")
        self.driver: dict[bytes, HostMemory] = {}
        self.engines: list[FakeEngine] = []

    def _plane(self, name: str, memory: HostMemory) -> Plane:
        self.engines.append(FakeEngine(memory, self.driver))
        return CudaIpcPlane(self.engines[-1])


@pytest.fixture
def rig() -> Iterator[IpcRig]:
    rig = IpcRig()
    yield rig
    rig.close()


def test_a_cancelled_copy_is_not_idle_until_it_ends(rig: IpcRig) -> None:
    """Guards against freeing blocks too early: the copy engine cannot be stopped."""
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    rig.engines[1].slow = True
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [0], [0])
    receiver.plane.cancel(X)
    receiver.plane.poll()
    assert not receiver.plane.idle(X) and receiver.plane.pending
    rig.engines[1].slow = False
    assert receiver.plane.poll() == []
    assert receiver.plane.idle(X) and not receiver.plane.pending


def test_forgetting_a_peer_fails_its_copies_and_closes_the_mapping_after_them(rig: IpcRig) -> None:
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    engine = rig.engines[1]
    engine.slow = True
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [0], [0])
    receiver.plane.forget(SENDER)
    receiver.plane.poll()
    assert engine.opened
    engine.slow = False
    rig.until(lambda: rig.received(receiver, ok=False) == {ChunkKey(X, 0, 0)})
    rig.turn()
    assert not engine.opened and not receiver.plane.pending


def test_a_pool_is_mapped_once(rig: IpcRig) -> None:
    """Guards against leaked mappings: each Hello calls `reaches`, which maps the pool."""
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    other = rig.end(OTHER)
    engine = rig.engines[1]
    receiver.plane.forget(SENDER)
    for _ in range(3):
        assert receiver.plane.reaches(sender.plane.describe())
    assert engine.opens == 1
    receiver.plane.connect(SENDER, sender.plane.describe())
    assert receiver.plane.reaches(sender.plane.describe()) and engine.opens == 1
    receiver.plane.forget(OTHER)
    assert receiver.plane.reaches(other.plane.describe()) and receiver.plane.reaches(sender.plane.describe())
    receiver.plane.forget(SENDER)
    assert receiver.plane.reaches(sender.plane.describe())  # it replaces the mapping without a connection
    receiver.plane.poll()
    assert len(engine.opened) == 1


def test_a_block_beyond_the_peers_pool_is_not_read(rig: IpcRig) -> None:
    """Guards against block ids of a peer that are outside its pool."""
    rig.end(SENDER, 3), rig.end(RECEIVER, 12)
    receiver = rig.ends[1]
    for seq, source in enumerate(([3], [0, 11], [-1])):
        receiver.plane.post_receive(SENDER, ChunkKey(X, seq, 0), source, list(range(len(source))))
    rig.turn()
    assert len(rig.received(receiver, ok=False)) == 3 and not rig.engines[1].copies


@pytest.mark.parametrize("described", ["9:31", "1000:2048", "1:1000000", "0:64", "2:-9", "2", "2:32:5"])
def test_rows_that_do_not_fit_are_not_read(rig: IpcRig, described: str) -> None:
    """Guards against a peer that describes rows outside of its memory, or ones that overlap."""
    sender, receiver = rig.end(SENDER, 3, 8), rig.end(RECEIVER, 3, 8)
    engine, address = rig.engines[1], sender.plane.describe()
    false = msgspec.structs.replace(address, address=f"{address.address}:{described}")
    receiver.plane.connect(OTHER, false)
    receiver.plane.post_receive(OTHER, ChunkKey(X, 0, 0), [0], [1])
    rig.turn()
    assert rig.received(receiver, ok=False) == {ChunkKey(X, 0, 0)} and not engine.copies


def test_a_receive_carries_the_engines_sums_and_their_digest(rig: IpcRig) -> None:
    """Guards against losing the engine's sums and computing them again on the I/O thread."""
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [0], [0])
    rig.turn()
    (done,) = [done for done in rig.done[RECEIVER] if not done.sending]
    assert done.ok and done.sums == b"sums of copy 1" and done.digest == digest_of_sums([done.sums])


def test_a_copy_that_fails_is_a_failed_receive(rig: IpcRig) -> None:
    sender, receiver = rig.end(SENDER), rig.end(RECEIVER)
    rig.engines[1].broken = True
    rig.move(sender, receiver, ChunkKey(X, 0, 0), [0], [0])
    rig.turn()
    assert rig.received(receiver, ok=False) == {ChunkKey(X, 0, 0)} and receiver.plane.idle(X)


def test_a_plane_does_not_reach_its_own_pool(rig: IpcRig) -> None:
    """Guards against opening a CUDA IPC handle in its own process, which CUDA refuses."""
    end = rig.end(SENDER)
    assert not end.plane.reaches(end.plane.describe())


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (2, 4), (4, 2), (1, 8), (8, 1)], ids=str)
def test_a_pair_of_ranks_costs_one_copy(sizes: tuple[int, int]) -> None:
    """Guards against a copy for each block, between groups whose ranks hold different units of consecutive blocks."""
    units, num_blocks = 8, 6
    driver: dict[bytes, HostMemory] = {}
    cuts = [Cut.even(units, ranks, 1) for ranks in sizes]
    memories = [[HostMemory(num_blocks * len(cut.units(rank)), 8) for rank in range(cut.ranks)] for cut in cuts]
    engines = [[FakeEngine(memory, driver) for memory in group] for group in memories]
    planes = [
        ShardedPlane(cut, num_blocks, [CudaIpcPlane(engine) for engine in group])
        for cut, group in zip(cuts, engines, strict=True)
    ]
    planes[1].connect(SENDER, planes[0].describe())
    planes[1].post_receive(SENDER, ChunkKey(X, 0, 0), range(num_blocks), range(num_blocks))
    copies = [evenly_spaced(runs, 800) for engine in engines[1] for _, runs in engine.copies.values()]
    assert [len(series) for series in copies] == [1] * max(sizes)
    for plane, group in zip(planes, memories, strict=True):
        plane.close()
        for memory in group:
            memory.close()
