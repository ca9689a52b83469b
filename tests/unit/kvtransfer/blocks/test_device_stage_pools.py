"""Pools of stages and ranks on GPUs, here in memory of the host: digests over layers are those of any other cut."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")
from baton.kvtransfer.blocks.checksum import digest_of_sums, sum64, unit_checksums
from baton.kvtransfer.blocks.copies import Pair
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.reshard import Cut
from baton.node.errors import InvariantBroken
from baton.tests.unit.worker.ranks.fake_gpus import FakeMemory, device_pool

from baton.kvtransfer.blocks import device_copies, run_copies  # isort: skip
from baton.kvtransfer.blocks.device_stage_pools import DeviceStagePools, stage_layouts  # isort: skip

UNITS, LAYERS, BLOCKS = 2, 3, 2
LAYOUT = KVLayout.of_model(
    num_layers=LAYERS,
    kv_heads=UNITS,
    head_dim=8,
    block_tokens=4,
    dtype="float8_e4m3fn",
    padding_bytes=8,
    scales="token",
)
CHUNKS = [[1, 0], [1]]
PADDINGS: dict[str, Callable[[KVLayout], int]] = {
    "none": lambda layout: 0,
    "layer": lambda layout: layout.layer_bytes,
    "data": lambda layout: layout.data_bytes,
}


class HostRuntime:
    """As much of cudart as copies need, for memory of the host: each is done at once."""

    MAX_PITCH = 1 << 20

    def __init__(self) -> None:
        self.num_copies = 0

    def use_device(self, index: int) -> None: ...

    def create_event(self) -> int:
        return 1

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def happened(self, event: int) -> bool:
        return True

    def copy_async(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self.copy_rows_async(target, source, (0, 0), size_bytes, 1, stream)

    def copy_rows_async(
        self, target: int, source: int, pitches: tuple[int, int], row_bytes: int, num_rows: int, stream: int
    ) -> None:
        self.num_copies += 1
        for row in range(num_rows):
            ctypes.memmove(target + row * pitches[0], source + row * pitches[1], row_bytes)


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> HostRuntime:
    runtime = HostRuntime()
    monkeypatch.setattr(device_pool, "DeviceMemory", partial(FakeMemory, {}))
    for module in (device_copies, run_copies):
        monkeypatch.setattr(module, "cudart", runtime)
    stream = SimpleNamespace(cuda_stream=0, device="cpu", synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: stream)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    return runtime


def content(block: int, unit: int, layer: int) -> np.ndarray:
    return np.frombuffer(random.Random(f"{block} {unit} {layer}").randbytes(LAYOUT.layer_bytes), np.uint8)


def filled(cut: Cut, padding: Callable[[KVLayout], int]) -> DeviceStagePools:
    pools = DeviceStagePools(cut, LAYOUT, BLOCKS, range(len(cut.layers) * cut.ranks), padding)
    ends = [(layers, cut.units(rank)) for layers in cut.layers for rank in range(cut.ranks)]
    for number, (pool, (layers, units)) in enumerate(zip(pools.pools, ends, strict=True)):
        assert (pool.memory.device_index, pool.layout.first_unit) == (number, units.start)
        memory = pool.memory.data.numpy()
        memory[:] = 255  # padding counts nowhere
        for block in range(BLOCKS):
            for unit in units:
                held = memory[block, unit - units.start]
                for layer in layers:
                    held[(layer - layers.start) * LAYOUT.layer_bytes :][: LAYOUT.layer_bytes] = content(
                        block, unit, layer
                    )
    return pools


@pytest.mark.parametrize(
    ("stages", "ranks", "padding"),
    [(1, 1, "data"), (2, 1, "layer"), (1, 2, "none"), (3, 2, "data"), (2, 4, "none")],
)
def test_any_cut_has_the_digests_of_one_pool(on_host, stages, ranks, padding):
    """Guards against sums in the order of stages and not of layers, against those of copies of a unit, and rows that
    begin where padding does."""
    pools = filled(Cut.even(UNITS, ranks, LAYERS, stages), PADDINGS[padding])
    expected = [
        np.stack([content(block, unit, layer) for block in chunk for unit in range(UNITS) for layer in range(LAYERS)])
        for chunk in CHUNKS
    ]
    assert pools.digests(CHUNKS) == [digest_of_sums([unit_checksums(rows).tobytes()]) for rows in expected]
    assert pools.layers_digest([1]) == pools.digests([[1]])[0]
    if len(pools.pools) == 1:
        assert pools.pools[0].layers_digest([1, 0]) == pools.digests(CHUNKS)[0]
    pools.close()
    with pytest.raises(InvariantBroken):
        pools.digests([[0]])


@pytest.mark.parametrize(
    ("stages", "ranks", "padding", "num_copies"),
    [(1, 1, "data", 1), (2, 1, "layer", 2), (3, 2, "data", 3 * 2), (2, 4, "none", 2 * 4)],
)
def test_records_are_those_of_one_pool(on_host, stages, ranks, padding, num_copies):
    """Guards against records that a worker with other stages cannot read: layers at other places, bytes that were in
    the store before where a record has padding, and digests of something else. Blocks and records are consecutive, so
    what a rank has of its units is one copy."""
    whole = np.zeros((BLOCKS, UNITS, LAYOUT.unit_bytes), np.uint8)
    for block in range(BLOCKS):
        for unit in range(UNITS):
            rows = np.concatenate([content(block, unit, layer) for layer in range(LAYERS)])
            whole[block, unit, : len(rows)] = rows
    expected = [sum64(memoryview(block), UNITS) for block in whole]
    cut, arena = Cut.even(UNITS, ranks, LAYERS, stages), HostMemory(BLOCKS, LAYOUT.block_bytes, UNITS)
    arena.view[:] = b"x" * len(arena.view)
    pools, others = (
        filled(cut, PADDINGS[padding]),
        DeviceStagePools(cut, LAYOUT, BLOCKS, range(stages * ranks), PADDINGS[padding]),
    )
    copies = pools.copies()
    assert (copies.block_bytes, copies.num_units, copies.digest) == (LAYOUT.block_bytes, UNITS, "sum64")
    save = copies.begin_save([Pair(block, arena.block(block)) for block in range(BLOCKS)])
    assert copies.ended(save) == expected and bytes(arena.view) == whole.tobytes()

    copies, on_host.num_copies = others.copies(), 0
    load = copies.begin_load([Pair(block, arena.block(block)) for block in range(BLOCKS)])
    assert copies.ended(load) == expected and on_host.num_copies == num_copies
    for wrote, read in zip(pools.pools, others.pools, strict=True):
        size = wrote.layout.num_layers * LAYOUT.layer_bytes
        assert torch.equal(wrote.memory.data[:, :, :size], read.memory.data[:, :, :size])
    copies.close()


def test_each_pool_is_padded_for_its_own_layers():
    """Guards against a stage whose units lie as those of the model, which reads all memory through few channels."""
    cut = Cut.even(UNITS, 2, LAYERS, 2)
    parts = stage_layouts(cut, LAYOUT, lambda layout: 8 * layout.num_layers + layout.padding_bytes)
    assert [(part.num_layers, part.first_unit, part.num_units, part.padding_bytes) for part in parts] == [
        (layers, unit, 1, 8 * layers) for layers in (2, 1) for unit in (0, 1)
    ]
    assert {(part.scales, part.block_tokens, part.total_units) for part in parts} == {("token", 4, UNITS)}
    with pytest.raises(ValueError, match="of 2 units of 3 layers"):
        stage_layouts(Cut.even(UNITS, 1, LAYERS + 1), LAYOUT, lambda layout: 0)
