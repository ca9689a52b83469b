"""The plane between workers with stages: each stage's layers get to the ranks that need them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import pytest
import xxhash

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.kvtransfer.blocks.copies import HostCopies, Pair
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import LayerMemory, StagePools
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.kvtransfer.reshard import Cut
from baton.node.credentials import Credentials
from baton.node.sockets import Context
from baton.testing.loopback import LoopbackFabric

UNITS, LAYERS, NUM_BLOCKS = 4, 5, 6
KEY = ChunkKey(b"x" * 16, 3, 0)
SOURCE, TARGET = [4, 1, 2], [0, 5, 3]


class Worker:
    """Pools of all ranks of all stages, and the plane over them."""

    def __init__(self, name: str, cut: Cut, planes: Sequence[Plane], pools: Sequence[BlockPool]) -> None:
        self.name, self.cut, self.pools = name, cut, pools
        self.plane = ShardedPlane(cut, NUM_BLOCKS, planes, self.digest)

    def digest(self, blocks: Sequence[int]) -> bytes:
        parts = [sorted({(unit, layer, bytes(data)) for unit, layer, data in self.layers(block)}) for block in blocks]
        return digest_of_sums(xxhash.xxh3_128_digest(data) for held in parts for _, _, data in held)

    def layers(self, block: int) -> Iterator[tuple[int, int, memoryview]]:
        """Unit, layer and bytes of all that the ranks hold of a block."""
        ends = [(layers, rank) for layers in self.cut.layers for rank in range(self.cut.ranks)]
        for pool, (layers, rank) in zip(self.pools, ends, strict=True):
            parts = iter(np.array_split(np.frombuffer(pool.block(block), np.uint8), pool.num_units * len(layers)))
            for unit in self.cut.units(rank):
                for layer in layers:
                    yield unit, layer, memoryview(next(parts))

    def fill(self, seed: int) -> None:
        for block in range(NUM_BLOCKS):
            for unit, layer, data in self.layers(block):
                data[:] = content(seed, block, unit, layer, len(data))


def content(seed: int, block: int, unit: int, layer: int, size: int) -> bytes:
    return random.Random(f"{seed} {block} {unit} {layer}").randbytes(size)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def workers(stack: ExitStack, kind: str, *cuts: Cut) -> list[Worker]:
    fabric, context, made = LoopbackFabric(), Context(Credentials("decode")), []
    stack.callback(context.close)
    for cut, name in zip(cuts, ("prefill/1", "decode/1"), strict=True):
        held = [(layers, cut.units(rank)) for layers in cut.layers for rank in range(cut.ranks)]
        pools = [
            BlockPool(KVLayout(len(layers), own.start, len(own), UNITS, 8, 4, "float32"), NUM_BLOCKS)
            for layers, own in held
        ]
        memories = [LayerMemory(pool) for pool in pools]
        names = [rank_name(name, number) for number in range(len(pools))]
        makers = {
            "loopback": lambda memory, name: fabric.plane(name, memory),
            "shm": lambda memory, name: ShmPlane(memory),
            "zmq": lambda memory, name: ZmqPlane(context, memory, name),
        }
        ends = [makers[kind](memory, name) for memory, name in zip(memories, names, strict=True)]
        made.append(Worker(name, cut, ends, pools))
        stack.callback(made[-1].plane.close)
    made[0].plane.connect(made[1].name, made[1].plane.describe())
    made[1].plane.connect(made[0].name, made[0].plane.describe())
    return made


def move(sender: Worker, receiver: Worker) -> list[bool]:
    """The outcomes at both ends of a chunk of the blocks SOURCE to TARGET."""
    receiver.plane.post_receive(sender.name, KEY, SOURCE, TARGET)
    sender.plane.post_send(receiver.name, KEY, SOURCE)
    done = []
    for _ in range(2000):
        for worker in (sender, receiver):
            for socket in worker.plane.sockets():
                socket.poll(1)  # type: ignore[attr-defined]
            done += worker.plane.poll()
        if len(done) == 2:
            break
    assert {each.digest for each in done if not each.sending} == {sender.digest(SOURCE)}
    return [each.ok for each in done]


SIZES = [(1, 1), (2, 1), (1, 2), (2, 4), (8, 2)]
CASES = [
    (kind, stages, ranks) for kind in ("loopback", "shm") for stages in ((2, 1), (3, 2), (1, 1)) for ranks in SIZES
]


@pytest.mark.parametrize(("kind", "stages", "ranks"), [*CASES, ("zmq", (2, 1), (2, 4))], ids=str)
def test_every_rank_gets_its_layers_and_nothing_else_changes(stack, kind, stages, ranks):
    """Guards against layers counted from the model's first, units that overlap, and stages that are left out."""
    cuts = [Cut.even(UNITS, ranks[end], LAYERS, stages[end]) for end in range(2)]
    sender, receiver = workers(stack, kind, *cuts)
    sender.fill(1)
    receiver.fill(2)
    assert receiver.plane.reaches(sender.plane.describe())
    assert move(sender, receiver) == [True, True]
    for block in range(NUM_BLOCKS):
        seed, came_from = (1, SOURCE[TARGET.index(block)]) if block in TARGET else (2, block)
        for unit, layer, data in receiver.layers(block):
            assert bytes(data) == content(seed, came_from, unit, layer, len(data)), (block, unit, layer)


def test_planes_of_units_and_of_layers_do_not_meet(stack):
    """Guards against rows that two workers count differently."""
    cut = Cut.even(UNITS, 1, LAYERS)
    (whole, _) = workers(stack, "shm", cut, cut)
    pool = BlockPool(KVLayout(LAYERS, 0, UNITS, UNITS, 8, 4, "float32"), NUM_BLOCKS)
    of_units = ShardedPlane(cut, NUM_BLOCKS, [ShmPlane(pool)])
    assert not whole.plane.reaches(of_units.describe()) and not of_units.reaches(whole.plane.describe())
    with pytest.raises(ValueError, match="2 stages has some layers"):
        ShardedPlane(Cut.even(UNITS, 1, LAYERS, 2), NUM_BLOCKS, [ShmPlane(pool)] * 2)


def test_pools_of_stages_are_one_pool_to_digests_and_the_store():
    """Guards against KV of a pipeline that other workers refuse or cannot read: a store's records are whole units."""
    layout = KVLayout.of_model(num_layers=LAYERS, kv_heads=UNITS, head_dim=8, block_tokens=4, dtype="float32")
    whole, cut = BlockPool(layout, 3), StagePools(Cut.even(UNITS, 1, LAYERS, 3), layout, 3)
    for block in range(3):
        whole.write(block, random.Random(block).randbytes(whole.block_bytes))
    copies = HostCopies(whole), HostCopies(cut)
    assert copies[0].block_bytes == copies[1].block_bytes
    for block in range(3):
        record, again = bytearray(whole.block_bytes), bytearray(whole.block_bytes)
        saved = copies[0].ended(copies[0].begin_save([Pair(block, memoryview(record))]))
        loaded = copies[1].ended(copies[1].begin_load([Pair(2 - block, memoryview(record))]))
        assert saved == loaded
        copies[1].begin_save([Pair(2 - block, memoryview(again))])
        assert again == record == whole.block(block)
    assert cut.digests([[2, 1], [0]]) == [whole.layers_digest(blocks) for blocks in ([0, 1], [2])]
    whole.close()
    cut.close()
