"""How products with weights of 8 bits are cut: tiles of linear_8bit_gluon, by shape and number of rows. Pure.

Rows past MOST_ROWS are cuBLAS's or, of INT8, product_8bit_gluon's; where these do not run, weights are dequantised.
"""

from __future__ import annotations

from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.quantised_table import tabled

FORMATS = ("fp8_row", "fp8_block", "int8_row")
BLOCK = 128
MOST_ROWS = 128
"""Of the policy of speed."""
SHARED_BYTES = 226 << 10
"""Of a multiprocessor."""
PROGRAMS = 132
"""Of an H100 or H200."""
GLUON_ROWS = {"fp8_row": 64, "int8_row": 64, "fp8_block": 8}
"""The most rows of which linear_8bit_gluon is ahead of linear_8bit, by format."""
GROUPS = {"fp8_row": 1, "int8_row": 1, "fp8_block": 2}
"""Of four warps: with two, those of one block wait for its scales while the others multiply."""
TILE_ROWS = 8, 16, 32, 64
"""Of x in a tile."""
MOST_STAGES = 12
PORTABLE_STAGES = 8
MANY_STAGES = 4
"""Of product_8bit_gluon."""


def fastest(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The fastest way for num_rows rows of x; None: another kernel's."""
    return tabled(num_rows, shape) or (_tiles(num_rows, shape) if num_rows <= MOST_ROWS else None)


def invariant(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The way whose bits do not depend on num_rows: rows in codes whatever their number, K in parts by the shape."""
    return _tiles(num_rows, shape)


def portable(num_rows: int, tiles: Tiles, fused: bool, inputs: int) -> Tiles:
    """Those of linear_8bit where Gluon is not available, with as many splits."""
    tile_m = next((size for size in (16, 32, 64) if num_rows <= size), 128)
    stage = (64 * (2 if fused else 1) + tile_m) * BLOCK
    stages = min((SHARED_BYTES // 2 - 4096) // stage, PORTABLE_STAGES, inputs // tiles.splits // BLOCK)
    return Tiles(64, BLOCK, tile_m, max(stages, 2), tiles.splits)


def by_gluon(num_rows: int, tiles: Tiles, fused: bool, most_rows: int) -> bool:
    """Whether linear_8bit_gluon has such tiles, for up to most_rows rows. It takes 128 rows of W together."""
    return num_rows <= most_rows and tiles.tile_n * (2 if fused else 1) == 128


def fit_many_rows(outputs: int, inputs: int) -> bool:
    """Whether product_8bit_gluon takes a weight, whose ring must be filled once."""
    return inputs % BLOCK == 0 and inputs >= MANY_STAGES * BLOCK and outputs % 8 == 0


def stage_bytes(tile_m: int) -> int:
    """128 rows of W, and those of x."""
    return (128 + tile_m) * BLOCK


def stages_that_fit(tile_m: int, programs: int = 1, groups: int = 1) -> int:
    """With so many programs on a multiprocessor, of so many groups of warps: a multiple of these, so that a stage has
    one group that waits for it. Beside them are the sums of a second group, and 3 KiB."""
    room = SHARED_BYTES // programs - 3 * 1024 - (groups - 1) * 128 * tile_m * 4
    return min(MOST_STAGES, room // stage_bytes(tile_m)) // groups * groups


def programs_that_fit(tiles: Tiles) -> int:
    """On a multiprocessor, by shared memory and registers."""
    few = tiles.warps == 4 and tiles.tile_m <= 32
    return 2 if few and tiles.stages <= stages_that_fit(tiles.tile_m, 2) else 1


def _tiles(num_rows: int, shape: ProductShape) -> Tiles | None:
    tile_n = 64 if shape.fused or shape.outputs % 128 else 128
    if shape.outputs % (BLOCK if shape.weight_format == "fp8_block" else tile_n) or shape.inputs % BLOCK:
        return None
    tile_m = next((size for size in TILE_ROWS if num_rows <= size), TILE_ROWS[-1])
    splits = _splits(shape, tile_n)
    blocks = shape.inputs // BLOCK // splits
    groups = min(GROUPS[shape.weight_format], blocks)
    units = shape.outputs // tile_n * splits * -(-num_rows // tile_m)
    of_group = -(-(-(-units // PROGRAMS) * blocks) // groups)
    stages = min(stages_that_fit(tile_m, 1, groups), max(3, of_group) * groups)
    return Tiles(tile_n, BLOCK, tile_m, stages, splits, 4 * groups)


def _splits(shape: ProductShape, tile_n: int) -> int:
    """By the shape alone: the fewest of which each program has a unit, nearly."""
    blocks, tiles = shape.inputs // BLOCK, shape.outputs // tile_n
    if shape.fused:
        return 1
    return next(
        (splits for splits in (1, 2, 4) if blocks % splits == 0 and tiles * splits > PROGRAMS * 2 // 3),
        4 if blocks % 4 == 0 else 1,
    )
