"""How a product with 4-bit weights is cut, by its shape and number of rows: tiles of linear_int4_gluon. Pure.

What a unit costs beside its blocks was measured (docs/benchmarks/kernels.md); quantised_table has what is faster than
the rules here. More rows than MOST_ROWS are dequantised first.
"""

from __future__ import annotations

import re
from dataclasses import replace

from baton.kernels.linear.grouped import block_size
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.quantised_table import tabled

PREFIX = "int4_"
MOST_ROWS = 128
PROGRAMS = 132
"""Of an H100 or H200."""
UNIT_BLOCKS = 3
"""A unit's beginning and end take as long as so many blocks."""
SHARED_BYTES = 226 << 10
MOST_STAGES = 12
TILE_ROWS = 8, 16, 32, 64
"""Of x in a tile. Up to 8 are summed by another instruction."""


def fastest(num_rows: int, shape: ProductShape) -> Tiles | None:
    """None: dequantise first."""
    return tabled(num_rows, shape) or (_tiles(num_rows, shape, 12, TILE_ROWS) if num_rows <= MOST_ROWS else None)


def invariant(num_rows: int, shape: ProductShape) -> Tiles | None:
    """One instruction, number of splits and of groups of warps for every number of rows. None: no tiles fit."""
    return _tiles(num_rows, shape, 8, TILE_ROWS[1:])


def portable(tiles: Tiles) -> Tiles:
    """Those of linear_int4 where Gluon is not available."""
    return replace(tiles, tile_m=min(32, max(16, tiles.tile_m)), stages=3, warps=4)


def block_of(shape: ProductShape) -> int | None:
    """The block of a weight of the shape's format."""
    named = re.match(rf"{PREFIX}g(\d+)", shape.weight_format)
    return block_size(shape.inputs, int(named[1])) if named else None


def _tiles(num_rows: int, shape: ProductShape, warps: int, rows_of_tiles: tuple[int, ...]) -> Tiles | None:
    block, tile_n = block_of(shape), 64 if shape.fused else 128
    if block is None or shape.outputs % tile_n:
        return None
    tile_m = next((size for size in rows_of_tiles if num_rows <= size), rows_of_tiles[-1])
    warps = 8 if tile_m >= 32 else warps
    splits = _splits(shape, block, tile_n)
    units = -(-shape.outputs // tile_n * splits * -(-num_rows // tile_m) // PROGRAMS)
    groups, blocks = warps // 4, units * shape.inputs // block // splits
    stages = min(stages_that_fit(block, tile_m, warps), max(2, -(-blocks // groups)) * groups)
    return Tiles(tile_n, block, tile_m, stages, splits, warps)


def stages_that_fit(block: int, tile_m: int, warps: int) -> int:
    """A multiple of the groups of four warps, which take blocks in turn: a stage has one that waits for it."""
    meeting_bytes, groups = (warps // 4 - 1) * 2 * 64 * tile_m * 4, warps // 4
    fitting = min(MOST_STAGES, (SHARED_BYTES - meeting_bytes) // (64 * block + tile_m * block * 2))
    return fitting // groups * groups


def _splits(shape: ProductShape, block: int, tile_n: int) -> int:
    """The number with which the busiest program has least to do; of equals the smallest."""
    blocks, tiles = shape.inputs // block, shape.outputs // tile_n
    if shape.fused:
        return 1

    def busiest(splits: int) -> int:
        return -(-tiles * splits // PROGRAMS) * (blocks // splits + UNIT_BLOCKS)

    return min((splits for splits in range(1, 9) if blocks % splits == 0), key=busiest)
