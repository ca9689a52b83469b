"""How products of experts are cut, and from which number of tokens on rows of experts are multiplied as prompts are.

Pure data and arithmetic; imports no torch. As `linear_policy`, but by rule: how many rows an expert gets, its tokens
decide.
"""

from __future__ import annotations

from baton.kernels.triton.linear_policy import ProductShape, Tiles

SHARED_BYTES = 226 << 10
"""Of a multiprocessor."""
MOST_STAGES = 6
BLOCK = 128
"""Outputs, and inputs, that share a scale where weights have 8 bits, and values of a run of codes."""
ROW_TILES = (16, 32, 64)
"""Rows of a tile: of wider ones the sums would leave no room for two programs."""


def tile_rows(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Rows of the tiles of so many tokens: few experts should need a second tile, which multiplies W again."""
    likely = min(num_tokens, num_tokens * top_k * 3 // (2 * num_experts) + 4)
    return next((size for size in ROW_TILES if likely <= size), ROW_TILES[-1])


def rows_tiles(shape: ProductShape, tile_m: int, element_bytes: int) -> Tiles | None:
    """Tiles of W for tiles of tile_m rows of x; None: no tiles divide the shape."""
    n, k = shape.outputs, shape.inputs
    tile_n = next((size for size in (64, 32, 16) if n % size == 0), 0)
    deepest = 256 // element_bytes
    tile_k = next((size for size in (128, 64, 32, 16) if size <= deepest and k % size == 0), 0)
    if not tile_n or not tile_k:
        return None
    stage = (tile_n * (2 if shape.fused else 1) + tile_m) * tile_k * element_bytes
    stages = max(2, min((SHARED_BYTES // 2 - 4096) // stage, MOST_STAGES))
    return Tiles(tile_n, tile_k, tile_m, stages, 1, prefetch=min(256, k))


def rows_tiles_8bit(shape: ProductShape, tile_m: int) -> Tiles | None:
    """Tiles of W of 8 bits; the product of gate and up leaves runs of 128 codes. None: no tiles divide the shape."""
    n, k = shape.outputs, shape.inputs
    if n % BLOCK or k % BLOCK:
        return None
    tile_n = BLOCK if shape.fused else 64
    stage = (tile_n * (2 if shape.fused else 1) + tile_m) * BLOCK
    stages = max(2, min((SHARED_BYTES // 2 - 8192) // stage, MOST_STAGES))
    return Tiles(tile_n, BLOCK, tile_m, stages, 1, 8 if tile_m > 32 and shape.fused else 4, prefetch=BLOCK)


def row_tiles(shape: ProductShape) -> Tiles | None:
    """Tiles of W for one token; None: no tiles divide the shape."""
    n, k = shape.outputs, shape.inputs
    tile_k = next((size for size in (2048, 1024, 512, 256, 128, 64, 32, 16) if k % size == 0), 0)
    tile_n = 2 if shape.fused else max(2, 4096 // max(tile_k, 1))
    tile_n = min(tile_n, 16)
    if not tile_k or n % tile_n:
        return None
    return Tiles(tile_n, tile_k, 0, 1, 1, 4)
