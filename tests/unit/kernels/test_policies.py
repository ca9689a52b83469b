"""Tiles of products with quantised weights: pure, so every shape and number of rows is tried."""

from __future__ import annotations

import pytest

from baton.kernels.triton import int4_policy, linear_8bit_policy
from baton.kernels.triton.experts_policy import BLOCK, router_splits, row_tiles_8bit
from baton.kernels.triton.linear_policy import DOWN_8B, GATE_UP_8B, O_8B, QKV_8B, ProductShape
from baton.kernels.triton.quantised_table import FORMATS, TABLE, TILE_ROWS, tabled
from baton.models.cuda.products import fastest

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
            groups = tiles.warps // 4
            assert tiles.stages % groups == 0 and tiles.stages >= 2 * groups, (shape, rows, tiles)
            stages = tiles.stages * linear_8bit_policy.stage_bytes(tiles.tile_m)
            sums = (groups - 1) * 128 * tiles.tile_m * 4
            assert linear_8bit_policy.by_gluon(rows, tiles, shape.fused, 256)
            assert stages + sums + 1024 <= MOST_SHARED_BYTES, (shape, rows, tiles)


def test_64_outputs_more_than_a_multiple_of_128_are_the_portable_kernel_s():
    """Guards against such weights, of latent attention for instance, being dequantised for each product."""
    shape = ProductShape(576, 2048, weight_format="fp8_row")
    tiles = linear_8bit_policy.fastest(1, shape)
    assert tiles is not None and not linear_8bit_policy.by_gluon(1, tiles, False, 64)
    portable = linear_8bit_policy.portable(1, tiles, False, shape.inputs)
    assert shape.outputs % portable.tile_n == 0 and shape.inputs % (portable.splits * portable.tile_k) == 0


def test_entries_of_the_table_are_tiles_that_the_kernels_take():
    """Guards against an entry that a launch refuses, that does not fit, that asks for more memory for parts of sums
    than is set aside, or that is never found."""
    for weight_format, of_format in ((each, TABLE[name]) for each, name in FORMATS.items()):
        of_4_bits = weight_format.startswith(int4_policy.PREFIX)
        for tile_m, shape, tiles in (
            (tile_m, shape._replace(weight_format=weight_format), tiles)
            for tile_m, by_shape in of_format.items()
            for shape, tiles in by_shape.items()
        ):
            groups = tiles.warps // 4
            assert tabled(tile_m, shape) == fastest(tile_m, shape) == tiles and tile_m == tiles.tile_m in TILE_ROWS
            assert tiles.tile_k == (int4_policy.block_of(shape) if of_4_bits else 128)
            assert tiles.tile_n == (64 if shape.fused else 128) and shape.outputs % tiles.tile_n == 0
            assert shape.inputs % (tiles.splits * tiles.tile_k) == 0 and not (shape.fused and tiles.splits > 1)
            assert groups in ((2, 3) if of_4_bits else (1, 2)) and tiles.stages % groups == 0
            stage = 128 * tiles.tile_k // 2 + 2 * tile_m * tiles.tile_k
            stage = stage if of_4_bits else linear_8bit_policy.stage_bytes(tile_m)
            assert tiles.stages * stage + (groups - 1) * 128 * tile_m * 4 + 1024 <= MOST_SHARED_BYTES
            planned = max(fastest(rows, shape).splits * rows for rows in (1, 16, 32, 64, 128))
            assert all(fastest(rows, shape).splits * rows <= planned for rows in range(1, 129))


def test_rows_between_and_shapes_without_an_entry_follow_the_rules():
    """Guards against an entry for other tiles of x, and deterministic runs that take it."""
    shape = O_8B._replace(weight_format="fp8_row")
    assert tabled(65, shape) is None and tabled(16, DOWN_8B) is None
    assert linear_8bit_policy.invariant(16, shape).splits == linear_8bit_policy.invariant(1, shape).splits


@pytest.mark.parametrize("inputs", [2048, 2880, 4096, 5120, 6144, 7168])
def test_a_router_s_product_is_cut(inputs):
    """Guards against one program for all inputs, which takes several times as long: 2,880 are not whole runs of 128."""
    splits = router_splits(1, inputs, invariant=True)
    assert splits >= 5 and inputs % (splits * 64) == 0
    assert router_splits(1, inputs, invariant=False) == splits


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("size", [128, 256, 384, 768, 1408, 2048, 4096, 7168])
def test_tiles_of_one_token_divide_experts_of_8_bits(size, blocked):
    """Guards against the first request of a model whose width few tiles divide, and tiles that cut through blocks."""
    for shape in (ProductShape(size, 2048, fused=True), ProductShape(2048, size), ProductShape(size, size, fused=True)):
        tiles = row_tiles_8bit(shape, blocked)
        assert shape.outputs % tiles.tile_n == 0 and shape.inputs % tiles.tile_k == 0, (shape, tiles)
        assert BLOCK % tiles.tile_n == 0 and tiles.prefetch <= shape.inputs, (shape, tiles)
        assert tiles.tile_n & (tiles.tile_n - 1) == tiles.tile_k & (tiles.tile_k - 1) == 0, (shape, tiles)
