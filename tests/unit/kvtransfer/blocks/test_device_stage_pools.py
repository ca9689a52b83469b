"""Pools of stages and ranks on GPUs, here in memory of the host: digests over layers are those of any other cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")
from baton.kvtransfer.blocks.checksum import digest_of_sums, unit_checksums
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.reshard import Cut
from baton.node.errors import InvariantBroken
from baton.tests.unit.worker.ranks.fake_gpus import FakeMemory, device_pool

from baton.kvtransfer.blocks.device_stage_pools import DeviceStagePools, stage_layouts  # isort: skip

UNITS, LAYERS, BLOCKS = 4, 5, 3
LAYOUT = KVLayout.of_model(
    num_layers=LAYERS,
    kv_heads=UNITS,
    head_dim=8,
    block_tokens=4,
    dtype="float8_e4m3fn",
    padding_bytes=8,
    scales="token",
)
CHUNKS = [[2, 0], [1], [0, 1, 2]]
PADDINGS: dict[str, Callable[[KVLayout], int]] = {
    "none": lambda layout: 0,
    "layer": lambda layout: layout.layer_bytes,
    "data": lambda layout: layout.data_bytes,
}


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pool, "DeviceMemory", partial(FakeMemory, {}))


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
    [(1, 1, "data"), (2, 1, "layer"), (1, 2, "none"), (3, 2, "data"), (2, 8, "none"), (5, 4, "layer")],
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
        assert pools.pools[0].layers_digest([2, 0]) == pools.digests(CHUNKS)[0]
    pools.close()
    with pytest.raises(InvariantBroken):
        pools.digests([[0]])


def test_each_pool_is_padded_for_its_own_layers():
    """Guards against a stage whose units lie as those of the model, which reads all memory through few channels."""
    cut = Cut.even(UNITS, 2, LAYERS, 3)
    parts = stage_layouts(cut, LAYOUT, lambda layout: 8 * layout.num_layers + layout.padding_bytes)
    assert [(part.num_layers, part.first_unit, part.num_units, part.padding_bytes) for part in parts] == [
        (layers, unit, 2, 8 * layers) for layers in (2, 2, 1) for unit in (0, 2)
    ]
    assert {(part.scales, part.block_tokens, part.total_units) for part in parts} == {("token", 4, UNITS)}
    with pytest.raises(ValueError, match="of 4 units of 5 layers"):
        stage_layouts(Cut.even(UNITS, 1, 6), LAYOUT, lambda layout: 0)
