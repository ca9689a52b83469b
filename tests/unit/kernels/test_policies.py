"""Tiles of products with quantised weights: pure, so every shape and number of rows is tried."""

from __future__ import annotations

import pytest

from baton.kernels.triton import int4_policy, linear_8bit_policy
from baton.kernels.triton.linear_policy import DOWN_8B, GATE_UP_8B, O_8B, QKV_8B, ProductShape

SHAPES = (
    *(QKV_8B, O_8B, GATE_UP_8B, DOWN_8B),
    *(ProductShape(10240, 8192), ProductShape(28672, 8192, fused=True), ProductShape(8192, 28672)),
    *(ProductShape(5120, 17408), ProductShape(17408, 5120, fused=True), ProductShape(256, 512)),
)
ROWS = 1, 8, 9, 16, 17, 32, 64, 100, 128, 200
MOST_SHARED_BYTES = 227 << 10


@pytest.mark.parametrize("policy", [int4_policy.fastest, int4_policy.invariant])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_stage_of_4_bit_weights_has_one_group_of_warps_that_waits_for_it(policy, group):
    """Guards against a barrier on whose two phases groups of warps wait in turn, and against tiles that do not fit."""
    for shape in SHAPES:
        for rows in ROWS:
            tiles = policy(rows, shape._replace(weight_format=f"int4_g{group}"))
            if tiles is not None:
                groups = tiles.warps // 4
                assert tiles.stages % groups == 0 and tiles.stages >= 2 * groups, (shape, rows, tiles)
                stage = 128 * tiles.tile_k // 2 + tiles.tile_m * tiles.tile_k * 2
                sums = (groups - 1) * 128 * tiles.tile_m * 4
                assert tiles.stages * stage + sums + 1024 <= MOST_SHARED_BYTES, (shape, rows, tiles)


@pytest.mark.parametrize("weight_format", linear_8bit_policy.FORMATS)
def test_tiles_of_8_bit_weights_fit(weight_format):
    for shape in SHAPES:
        for rows in ROWS:
            tiles = linear_8bit_policy.invariant(rows, shape._replace(weight_format=weight_format))
            assert tiles is not None and shape.inputs % (tiles.splits * tiles.tile_k) == 0, (shape, rows, tiles)
            stages = tiles.stages * linear_8bit_policy.stage_bytes(tiles.tile_m)
            assert linear_8bit_policy.by_gluon(rows, tiles, shape.fused, 256) and stages < MOST_SHARED_BYTES


def test_64_outputs_more_than_a_multiple_of_128_are_the_portable_kernel_s():
    """Guards against such weights, of latent attention for instance, being dequantised for each product."""
    shape = ProductShape(576, 2048, weight_format="fp8_row")
    tiles = linear_8bit_policy.fastest(1, shape)
    assert tiles is not None and not linear_8bit_policy.by_gluon(1, tiles, False, 64)
    portable = linear_8bit_policy.portable(1, tiles, False, shape.inputs)
    assert shape.outputs % portable.tile_n == 0 and shape.inputs % (portable.splits * portable.tile_k) == 0
