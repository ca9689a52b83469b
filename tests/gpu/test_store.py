"""The host's KV store with a GPU: digests computed on the device, copies to and from pinned memory, and a session.

The last test prints what it measured as a JSON line (pytest -s).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from baton.kvtransfer.blocks.checksum import sum64
from baton.kvtransfer.blocks.copies import Copies, Pair
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.store.arena_index import Key
from baton.kvtransfer.store.events import StoreEvent, StoreFound, StoreLoaded, StoreWritten
from baton.kvtransfer.store.session import StoreSession
from baton.node.errors import InvariantBroken, PeerLost
from baton.node.leg import LegKey
from baton.node.messages.store import RAM
from baton.tests.unit.kvtransfer.store.bench import BLOCK_BYTES as BENCH_BLOCK_BYTES
from baton.tests.unit.kvtransfer.store.bench import SPACE, Host, names

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

MIB = 1 << 20
PATIENCE_S = 30.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.0002)


def units_of(block_bytes: int) -> int:
    """Number of units of whole words: several if possible."""
    return next(count for count in (8, 3, 1) if block_bytes % (8 * count) == 0)


def random_memory(num_blocks: int, block_bytes: int):
    from baton.kvtransfer.blocks.device_pool import DeviceMemory

    memory = DeviceMemory(num_blocks, block_bytes, 0, units_of(block_bytes))
    memory.data.random_(0, 256)
    torch.cuda.synchronize()
    return memory


class Bench:
    """A pool of 12 blocks and 12 blocks of pinned host memory."""

    def __init__(self, block_bytes: int) -> None:
        from baton.kvtransfer.blocks.device_copies import DeviceCopies

        self.memory = random_memory(12, block_bytes)
        self.host = HostMemory(12, block_bytes)
        self.copies = DeviceCopies(self.memory)
        self.lock = self.copies.lock(self.host.view)
        wait_until(self.lock.ready)

    def pairs(self, blocks: list[int], places: list[int]) -> list[Pair]:
        return [Pair(block, self.host.block(place)) for block, place in zip(blocks, places, strict=True)]

    def ended(self, copy: int) -> list[bytes]:
        digests: list[bytes] | None = None

        def done() -> bool:
            nonlocal digests
            digests = self.copies.ended(copy)
            return digests is not None

        wait_until(done)
        assert digests is not None
        return digests

    def close(self) -> None:
        self.copies.close()
        self.copies.close()
        self.lock.close()
        self.host.close()
        self.memory.close()


@pytest.fixture(params=[4096, 96 * 1024, MIB, 8 * MIB])
def copying(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("block_bytes", [4104, 64 * 1024 + 8, 8 * MIB])
def test_device_digests_equal_host_digests(block_bytes: int) -> None:
    """Guards verification: the store must compute the same digest for a block as the GPU that put it."""
    from baton.kvtransfer.blocks.digest import BlockDigests

    memory = random_memory(7, block_bytes)
    chosen = [6, 0, 3, 3, 5]
    expected = [sum64(memoryview(memory.data[block].cpu().numpy()), memory.num_units) for block in chosen]
    assert BlockDigests(memory.data).each(chosen) == expected
    memory.close()


def test_batches_move_the_bytes_and_report_the_digests(copying: Bench) -> None:
    """Guards against wrongly split or merged runs, bytes of other blocks, and digests of bytes not in the pool."""
    before = copying.memory.data.cpu()
    chosen, places, into = [3, 4, 5, 9, 0, 1], [2, 3, 4, 8, 7, 6], [2, 7, 8, 11, 10, 6]
    expected = [sum64(memoryview(before[block].numpy()), copying.memory.num_units) for block in chosen]
    assert copying.ended(copying.copies.begin_save(copying.pairs(chosen, places))) == expected
    saved = b"".join(bytes(copying.host.block(place)) for place in places)
    assert saved == before[chosen].numpy().tobytes()
    assert copying.ended(copying.copies.begin_load(copying.pairs(into, places))) == expected
    after = before.clone()
    after[into] = before[chosen]
    assert torch.equal(copying.memory.data.cpu(), after)


def test_pools_of_ranks_save_and_load_records_of_the_model() -> None:
    """Guards what two ranks put for four to find: each copies its heads of a record, and digests are of the record."""
    from baton.kvtransfer.blocks.device_copies import DeviceCopies
    from baton.kvtransfer.blocks.device_pool import DeviceMemory
    from baton.kvtransfer.blocks.rank_copies import RankCopies
    from baton.kvtransfer.reshard import Cut

    units, unit_bytes = 8, 64 * 1024
    host, content = HostMemory(6, units * unit_bytes), torch.randint(0, 256, (6, units, unit_bytes), dtype=torch.uint8)

    def group(ranks: int) -> tuple[list[DeviceMemory], RankCopies]:
        held = units // ranks
        memories = [DeviceMemory(6, held * unit_bytes, 0, held) for _ in range(ranks)]
        return memories, RankCopies([DeviceCopies(memory) for memory in memories], Cut.even(units, ranks, 1))

    def ended(copies: RankCopies, copy: int) -> list[bytes]:
        digests: list[bytes] | None = None

        def done() -> bool:
            nonlocal digests
            digests = copies.ended(copy)
            return digests is not None

        wait_until(done)
        assert digests is not None
        return digests

    wrote, saves = group(2)
    for rank, memory in enumerate(wrote):
        memory.data.copy_(content[:, 4 * rank : 4 * rank + 4])
    torch.cuda.synchronize()
    lock = saves.lock(host.view)
    wait_until(lock.ready)
    expected = [sum64(memoryview(content[block].numpy()).cast("B"), units) for block in (3, 4, 0)]
    assert ended(saves, saves.begin_save([Pair(block, host.block(block)) for block in (3, 4, 0)])) == expected
    read, loads = group(4)
    assert ended(loads, loads.begin_load([Pair(block, host.block(block)) for block in (3, 4, 0)])) == expected
    for rank, memory in enumerate(read):
        assert torch.equal(memory.data[[3, 4, 0]].cpu(), content[[3, 4, 0], 2 * rank : 2 * rank + 2])
    for each in (saves, loads, lock):
        each.close()
    for memory in (*wrote, *read):
        memory.close()


def test_pools_of_stages_save_and_load_records_of_the_model() -> None:
    """Guards what a worker with one pool puts for one with stages to find, and the other way: each stage copies its
    layers of a record, and digests are of the record, with its padding."""
    from baton.kvtransfer.blocks.device_copies import DeviceCopies
    from baton.kvtransfer.blocks.device_pool import DevicePool
    from baton.kvtransfer.blocks.device_stage_pools import DeviceStagePools
    from baton.kvtransfer.blocks.layout import KVLayout
    from baton.kvtransfer.reshard import Cut

    layout = KVLayout.of_model(
        num_layers=10, kv_heads=4, head_dim=64, block_tokens=16, dtype="bfloat16", padding_bytes=4096
    )
    whole, host = DevicePool(layout, 6, 0), HostMemory(8, layout.block_bytes, layout.num_units)
    whole.memory.data[:, :, : 10 * layout.layer_bytes].random_(0, 256)
    torch.cuda.synchronize()
    stages = DeviceStagePools(Cut.even(4, 1, 10, 3), layout, 6, [0, 0, 0], lambda part: part.layer_bytes)
    of_whole, of_stages = DeviceCopies(whole.memory), stages.copies()
    lock = of_whole.lock(host.view)
    wait_until(lock.ready)

    def ended(copies: Copies, copy: int) -> list[bytes]:
        digests: list[list[bytes]] = []

        def done() -> bool:
            found = copies.ended(copy)
            digests.extend([] if found is None else [found])
            return bool(digests)

        wait_until(done)
        return digests[0]

    saved = ended(of_whole, of_whole.begin_save([Pair(block, host.block(block)) for block in (3, 4, 0)]))
    assert ended(of_stages, of_stages.begin_load([Pair(block, host.block(block)) for block in (3, 4, 0)])) == saved
    host.view[5 * layout.block_bytes :] = b"x" * (3 * layout.block_bytes)
    pairs = [Pair(block, host.block(place)) for block, place in ((3, 5), (4, 6), (0, 7))]
    assert ended(of_stages, of_stages.begin_save(pairs)) == saved
    assert [bytes(host.block(place)) for place in (5, 6, 7)] == [bytes(host.block(block)) for block in (3, 4, 0)]
    assert stages.digests([[3, 4], [0]]) == [whole.layers_digest(blocks) for blocks in ([3, 4], [0])]
    for each in (of_whole, of_stages, lock, whole, stages):
        each.close()


def test_a_flipped_bit_changes_the_digest(copying: Bench) -> None:
    """Guards the only check of a hit."""
    (right,) = copying.ended(copying.copies.begin_save(copying.pairs([0], [0])))
    copying.host.block(0)[copying.memory.block_bytes // 2] ^= 1
    assert copying.ended(copying.copies.begin_load(copying.pairs([1], [0]))) != [right]
    copying.host.block(0)[copying.memory.block_bytes // 2] ^= 1
    assert copying.ended(copying.copies.begin_load(copying.pairs([1], [0]))) == [right]


def test_batches_overlap_and_their_number_is_bounded(copying: Bench) -> None:
    """Guards the digest buffers: each of two batches has its own, and a third batch waits."""
    before = copying.memory.data.cpu()
    save = [copying.copies.begin_save(copying.pairs([block], [block])) for block in (0, 1)]
    with pytest.raises(InvariantBroken):
        copying.copies.begin_save(copying.pairs([2], [2]))
    expected = [[sum64(memoryview(before[block].numpy()), copying.memory.num_units)] for block in (0, 1)]
    assert [copying.ended(each) for each in save] == expected
    for pairs in ([Pair(12, copying.host.block(0))], [Pair(0, copying.host.block(0)[:-1])]):
        with pytest.raises(InvariantBroken):
            copying.copies.begin_load(pairs)


def test_memory_that_cannot_be_pinned_is_reported(copying: Bench) -> None:
    """Guards against an unseen error in a thread: these pages are already pinned."""
    again = copying.copies.lock(copying.host.view)

    def is_reported() -> bool:
        try:
            return again.ready()
        except PeerLost:
            return True

    wait_until(is_reported)
    with pytest.raises(PeerLost):
        again.ready()


class Rig:
    """A session with a GPU's copies, against a real server and arena in this process."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        from baton.kvtransfer.blocks.device_copies import DeviceCopies

        self.memory = random_memory(num_blocks, block_bytes)
        self.host = Host(slots=num_blocks * block_bytes // BENCH_BLOCK_BYTES)
        self.events: list[StoreEvent] = []
        self.session = StoreSession(SPACE, DeviceCopies(self.memory), self._send, self.events.append)
        self.attach()

    def attach(self) -> None:
        """Attach again if the test was slow enough for the store's lease to expire."""
        self.turn()
        self.until(lambda: self.session.attached)

    def _send(self, message: object) -> None:
        self.host.wire.append(("w", "host", message))  # type: ignore[arg-type]

    def turn(self) -> None:
        now = time.monotonic()
        self.session.tick(now)
        self.host.server.tick(now)
        while self.host.wire:
            _, to, message = self.host.wire.popleft()
            if to == "host":
                self.host.server.on_message("w", message, now)
            else:
                self.session.on_message(message, now)
        self.session.work(time.monotonic)

    def until(self, condition: Callable[[], bool]) -> None:
        def turned() -> bool:
            self.turn()
            return condition()

        wait_until(turned)

    def next(self, kind: type[StoreEvent]) -> StoreEvent:
        self.until(lambda: any(isinstance(event, kind) for event in self.events))
        self.turn()  # the store receives the release
        (event,) = self.events
        self.events.clear()
        return event

    def put(self, count: int) -> int:
        self.attach()
        self.session.put(b"put", names(*range(count)), range(count), time.monotonic())
        written = self.next(StoreWritten)
        assert isinstance(written, StoreWritten)
        return written.num_blocks

    def load(self, count: int, blocks: list[int]) -> StoreLoaded:
        self.attach()
        key = LegKey("r", time.monotonic_ns() & 0xFFFF)
        self.session.lookup(key, names(*range(count)), 0, time.monotonic())
        found = self.next(StoreFound)
        assert isinstance(found, StoreFound) and found.tiers == (RAM,) * count
        self.session.load(key, 0, blocks, time.monotonic())
        loaded = self.next(StoreLoaded)
        assert isinstance(loaded, StoreLoaded)
        return loaded

    def close(self) -> None:
        self.session.close()
        self.memory.close()


def test_blocks_are_put_and_come_back_bit_for_bit() -> None:
    """Guards the whole path: from a GPU's pool into the arena, and back into other blocks of a zeroed pool."""
    rig = Rig(64, MIB)
    before = rig.memory.data.cpu()
    assert rig.put(40) == 40
    rig.memory.data.zero_()
    torch.cuda.synchronize()
    into = random.Random(1).sample(range(64), 40)
    assert rig.load(40, into).num_blocks == 40
    assert torch.equal(rig.memory.data[into].cpu(), before[:40])
    untouched = [block for block in range(64) if block not in into]
    assert not rig.memory.data[untouched].any()
    rig.host.server.index.check()
    assert rig.host.server.index.num_holders == 0
    rig.close()


def test_a_damaged_block_ends_the_run_and_is_removed() -> None:
    """Guards against decoding from damaged KV, and the store's own verification of a GPU's blocks."""
    rig = Rig(32, MIB)
    assert rig.put(20) == 20
    entry = rig.host.server.index.find(Key(SPACE, names(7)[0]))
    assert entry is not None
    rig.host.arena.span(entry.offset + 12345, 1)[0] ^= 1
    assert rig.load(20, list(range(20))).num_blocks == 7
    rig.until(lambda: rig.host.server.index.find(entry.key) is None)
    assert rig.session.counters.store_damaged_blocks == 1 and rig.host.server.index.evictions["damaged"] == 1
    rig.close()


def test_a_stopped_load_ends_after_its_last_write() -> None:
    """Guards blocks after StoreLoaded: the load must not overwrite their next contents."""
    rig = Rig(256, MIB)
    assert rig.put(256) == 256
    rig.attach()
    key = LegKey("r", 0)
    rig.session.lookup(key, names(*range(256)), 0, time.monotonic())
    rig.next(StoreFound)
    rig.session.load(key, 0, list(range(256)), time.monotonic())
    rig.session.work(time.monotonic)
    rig.session.stop(key, time.monotonic())
    loaded = rig.next(StoreLoaded)
    assert isinstance(loaded, StoreLoaded) and loaded.num_blocks < 256
    rig.memory.data.zero_()
    torch.cuda.synchronize()
    time.sleep(0.05)
    assert not rig.memory.data.any()
    rig.close()


def test_two_gib_at_speed() -> None:
    """Prints GB/s (1e9) of a put and of two loads of 2 GiB in blocks of 8 MiB, in order and scattered in the pool."""
    count, block_bytes = 256, 8 * MIB
    began_at = time.monotonic()
    rig = Rig(count, block_bytes)
    attached_s = time.monotonic() - began_at
    before = rig.memory.data.cpu()
    rig.attach()
    began_at = time.monotonic()
    assert rig.put(count) == count
    put_s = time.monotonic() - began_at
    rates = {"put_gb_s": count * block_bytes / put_s / 1e9, "attached_s": attached_s}
    for name, into in (("in_order", list(range(count))), ("scattered", random.Random(2).sample(range(count), count))):
        rig.memory.data.zero_()
        torch.cuda.synchronize()
        loaded = rig.load(count, into)
        assert loaded.num_blocks == count and torch.equal(rig.memory.data[into].cpu(), before)
        rates[f"load_{name}_gb_s"] = count * block_bytes / loaded.load_s / 1e9
        rates[f"load_{name}_turn_ms"] = (loaded.load_s - loaded.copy_s) * 1e3
    one = rig.load(1, [0])
    rates |= {"load_one_block_ms": one.load_s * 1e3, "load_one_block_turn_ms": (one.load_s - one.copy_s) * 1e3}
    gpu = torch.cuda.get_device_name()
    print(json.dumps({"test": "store_copies", "gpu": gpu, **{name: round(value, 3) for name, value in rates.items()}}))
    rig.close()
