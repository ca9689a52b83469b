"""The plane between GPUs of workers with stages, over a scripted copy engine: units may have padding at either end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.blocks.runs import RowSpacing, evenly_spaced
from baton.kvtransfer.planes.base import ChunkKey, choose
from baton.kvtransfer.planes.cuda_ipc import CudaIpcPlane
from baton.kvtransfer.planes.sharded import ShardedPlane
from baton.kvtransfer.reshard import Cut
from baton.node.messages.base import MAX_BLOCK_ID
from baton.tests.unit.kvtransfer.planes.test_cuda_ipc_plane import FakeEngine

UNITS, LAYERS, BLOCKS, LAYER_BYTES = 4, 5, 6, 24
KEY = ChunkKey(b"x" * 16, 3, 0)


class Shape(NamedTuple):
    stages: int
    ranks: int
    padding_bytes: tuple[int, ...]
    """Of each stage."""


class Worker:
    """Memory of all ranks of all stages, and the plane over it."""

    def __init__(self, shape: Shape, driver: dict[bytes, HostMemory]) -> None:
        self.cut = cut = Cut.even(UNITS, shape.ranks, LAYERS, shape.stages)
        self.memories: list[HostMemory] = []
        self.spacings: list[RowSpacing] = []
        for layers, padding in zip(cut.layers, shape.padding_bytes, strict=False):
            for rank in range(cut.ranks):
                unit_bytes = len(layers) * LAYER_BYTES + padding
                num_units = len(cut.units(rank))
                self.memories.append(HostMemory(BLOCKS, num_units * unit_bytes, num_units))
                self.spacings.append(RowSpacing(LAYER_BYTES, len(layers), unit_bytes))
        self.engines = [
            FakeEngine(memory, driver, spacing) for memory, spacing in zip(self.memories, self.spacings, strict=True)
        ]
        self.plane = ShardedPlane(cut, BLOCKS, [CudaIpcPlane(engine) for engine in self.engines], self.digest)

    def digest(self, blocks: Sequence[int]) -> bytes:
        return b"of %r" % (tuple(blocks),)

    def layers(self) -> Iterator[tuple[int, int, int, memoryview]]:
        """Block, unit, layer and bytes of all that is held."""
        ends = [(layers, rank) for layers in self.cut.layers for rank in range(self.cut.ranks)]
        for memory, spacing, (layers, rank) in zip(self.memories, self.spacings, ends, strict=True):
            units = self.cut.units(rank)
            for block in range(BLOCKS):
                for unit in units:
                    for layer in layers:
                        at = (block * len(units) + unit - units.start) * spacing.group_bytes
                        at += (layer - layers.start) * LAYER_BYTES
                        yield block, unit, layer, memory.view[at : at + LAYER_BYTES]

    def fill(self, seed: int) -> None:
        for memory in self.memories:
            memory.view[:] = bytes([seed]) * len(memory.view)
        for block, unit, layer, data in self.layers():
            data[:] = content(seed, block, unit, layer)

    def between(self, seed: int) -> bool:
        """Whether what lies between units is as it was filled."""
        size = sum(len(memory.view) for memory in self.memories)
        held = b"".join(bytes(data) for *_, data in self.layers())
        seen = sum(bytes(memory.view).count(seed) for memory in self.memories)
        return seen - held.count(seed) == size - len(held)

    def close(self) -> None:
        self.plane.close()
        for memory in self.memories:
            memory.close()


def content(seed: int, block: int, unit: int, layer: int) -> bytes:
    return bytes((16 + seed, 32 + block, 64 + unit, 128 + layer)) * (LAYER_BYTES // 4)


shapes = st.builds(
    Shape,
    st.integers(1, LAYERS),
    st.sampled_from([1, 2, 4, 8]),
    st.tuples(*[st.sampled_from([0, 8, LAYER_BYTES])] * LAYERS),
)
blocks = st.permutations(range(BLOCKS))


@settings(max_examples=25)
@given(shapes, shapes, blocks, blocks, st.integers(1, BLOCKS))
def test_any_cut_gives_its_layers_to_any_other(sends, receives, source, target, count):
    """Guards against rows of a peer counted with one's own padding or layers, units left out, and bytes between units
    that change."""
    driver: dict[bytes, HostMemory] = {}
    sender, receiver = Worker(sends, driver), Worker(receives, driver)
    sender.fill(1)
    receiver.fill(2)
    source, target = source[:count], target[:count]
    assert choose([receiver.plane], [sender.plane.describe()]) is receiver.plane
    receiver.plane.connect("prefill/1", sender.plane.describe())
    receiver.plane.post_receive("prefill/1", KEY, source, target)
    (done,) = receiver.plane.poll()
    assert done.ok and done.digest == receiver.digest(target)
    for block, unit, layer, data in receiver.layers():
        seed, came_from = (1, source[target.index(block)]) if block in target else (2, block)
        assert bytes(data) == content(seed, came_from, unit, layer), (block, unit, layer)
    assert receiver.between(2)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("padding", [0, LAYER_BYTES])
@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, BLOCKS)])
def test_a_pair_of_ends_costs_few_copies(padding, ranks, copies):
    """Guards against a copy for each unit, where blocks are consecutive at both ends, and for each block, where all of
    its units go to one rank."""
    driver: dict[bytes, HostMemory] = {}
    sender, receiver = Worker(Shape(2, 1, (padding, 0)), driver), Worker(Shape(1, ranks, (0,)), driver)
    receiver.plane.connect("prefill/1", sender.plane.describe())
    receiver.plane.post_receive("prefill/1", KEY, range(BLOCKS), range(BLOCKS))
    series = [evenly_spaced(runs, 4096) for engine in receiver.engines for _, runs in engine.copies.values()]
    assert [len(each) for each in series] == [copies] * 2 * ranks
    receiver.plane.poll()
    sender.close()
    receiver.close()


def test_whole_blocks_are_preferred():
    """Guards against smaller copies, and a digest that is waited for, between workers of which none has stages, and
    against an older worker that offers no layers."""
    driver: dict[bytes, HostMemory] = {}
    one, other, staged = (Worker(Shape(stages, 1, (0, 0)), driver) for stages in (1, 1, 2))
    own = [CudaIpcPlane(FakeEngine(one.memories[0], driver)), one.plane]
    theirs = [CudaIpcPlane(FakeEngine(other.memories[0], driver)), other.plane]
    assert choose(own, [plane.describe() for plane in theirs]) is own[0]
    assert choose(own, [staged.plane.describe()]) is one.plane
    assert choose(own[:1], [staged.plane.describe()]) is None
    for worker in (one, other, staged):
        worker.close()


def test_blocks_beyond_a_peers_pool_fail_their_receive():
    """Guards against numbers of a peer's rows that no array of integers holds, for the largest block of an Offer."""
    driver: dict[bytes, HostMemory] = {}
    sender, receiver = Worker(Shape(2, 1, (0, 0)), driver), Worker(Shape(1, 2, (0,)), driver)
    receiver.plane.connect("prefill/1", sender.plane.describe())
    receiver.plane.post_receive("prefill/1", KEY, [MAX_BLOCK_ID], [0])
    assert [done.ok for done in receiver.plane.poll()] == [False]
    assert not any(engine.copies for engine in receiver.engines)
    sender.close()
    receiver.close()


def test_nothing_is_mapped_before_it_is_used():
    """Guards against mappings, each of a peer's whole pool, that an offer costs which another plane makes needless."""
    driver: dict[bytes, HostMemory] = {}
    sender, receiver = Worker(Shape(2, 1, (0, 0)), driver), Worker(Shape(1, 1, (0,)), driver)
    receiver.plane.connect("prefill/1", sender.plane.describe())
    sender.plane.connect("decode/1", receiver.plane.describe())
    assert [engine.opens for engine in (*sender.engines, *receiver.engines)] == [0, 0, 0]
    sender.close()
    receiver.close()
