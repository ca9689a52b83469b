"""How products with weights of 8 bits are cut: tables of shapes that were measured, and a rule for the others.

Pure data and arithmetic; imports no torch. Rows past the tables are cuBLAS's or, of INT8, those of dequantised weights.
"""

from __future__ import annotations

from baton.kernels.triton.linear_policy import ProductShape, Tiles

FORMATS = ("fp8_row", "fp8_block", "int8_row")
BLOCK = 128
MOST_ROWS = 128
"""Of the policy of speed, where no table says otherwise."""
SHARED_BYTES = 226 << 10
"""Of a multiprocessor."""
MOST_STAGES = 8
PROGRAMS = 256
"""A product whose weight has fewer tiles is split: two programs and more for each of a Hopper's 132 multiprocessors."""


def fastest(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The fastest way for num_rows rows of x; None: another kernel's."""
    if num_rows > MOST_ROWS:
        return None
    return fitting(num_rows, shape)


def invariant(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The way whose bits do not depend on num_rows: rows in codes whatever their number, K in parts by the shape."""
    return fitting(min(num_rows, 2 * BLOCK), shape, deepest=BLOCK)


def fitting(num_rows: int, shape: ProductShape, deepest: int = 2 * BLOCK) -> Tiles | None:
    """Tiles of up to `deepest` inputs for rows in codes, or None. Splits go by the shape alone."""
    n, k = shape.outputs, shape.inputs
    tile_m = next((size for size in (16, 32, 64) if num_rows <= size), 128)
    if n % 64 or k % BLOCK or (shape.weight_format == "fp8_block" and n % BLOCK):
        return None
    shallow = shape.fused or tile_m > 16 or shape.weight_format == "fp8_block" or k % deepest
    tile_k = BLOCK if shallow else deepest
    splits = 1
    while not shape.fused and splits < 4 and n // 64 * splits < PROGRAMS and k % (2 * splits * 256) == 0:
        splits *= 2
    stage = (64 * (2 if shape.fused else 1) + tile_m) * tile_k
    stages = min((SHARED_BYTES // 2 - 4096) // stage, MOST_STAGES, k // splits // tile_k)
    return Tiles(64, tile_k, tile_m, max(stages, 2), splits)
