"""How products of experts are cut, and from which number of tokens on rows of experts are multiplied as prompts are.

Pure data and arithmetic; imports no torch. As `linear_policy`, but by rule: how many rows an expert gets, its tokens
decide.
"""

from __future__ import annotations

from baton.kernels.triton.linear_policy import ProductShape, Tiles

SHARED_BYTES = 222 << 10
"""Of a multiprocessor, less what a program takes beside its tiles."""
ROW_TILES = (16, 32, 64)
"""Rows of a tile: of wider ones the sums would leave no room for two programs."""
PROMPT_ROWS = 128
"""Rows of a tile of experts_gluon."""
WIDE, PROGRAMS = 128, 200
"""Rows of W, or of gate and of up each, of a wide program, and how many of them are enough for a Hopper's 132
multiprocessors."""
NARROW = 64
"""Rows of W of one that is not wide, where weights have 8 bits."""
LEAST_PROMPT_ROWS = 40
"""Of an expert, on average, from which on experts_gluon is ahead: it reads each W once, whatever the number of rows."""
BLOCK = 128
"""Outputs, and inputs, that share a scale where weights have 8 bits, and values of a run of codes."""
FEW_TOKENS = 256
"""Up to so many, parts of a router's product gain more than they cost the kernel that sums them."""
ROUTER_SPLITS = (8, 9, 7, 6, 5, 4, 3, 2)
ROUTER_TILES_K = (128, 64)
"""Inputs that a program multiplies at a time: the largest that divide into parts."""


def router_splits(num_tokens: int, num_inputs: int, invariant: bool) -> int:
    """Parts of a router's product; by the inputs alone where a token's bits may not depend on the others."""
    if num_tokens > FEW_TOKENS and not invariant:
        return 1
    cuts = (splits for tile in ROUTER_TILES_K for splits in ROUTER_SPLITS if num_inputs % (splits * tile) == 0)
    return next(cuts, 1)


def as_prompts(num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether experts_gluon, where it runs, is the fastest way for so many tokens."""
    return num_tokens * top_k >= num_experts * LEAST_PROMPT_ROWS


def tile_rows(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Rows of the tiles of so many tokens: few experts should need a second tile, which multiplies W again."""
    likely = min(num_tokens, num_tokens * top_k * 3 // (2 * num_experts) + 4)
    return next((size for size in ROW_TILES if likely <= size), ROW_TILES[-1])


def rows_tiles(shape: ProductShape, tile_m: int, num_tiles: int, element_bytes: int) -> Tiles | None:
    """Tiles of W for num_tiles tiles of tile_m rows of x; None: no tiles divide the shape.

    Measured on an H200 with the shapes of Qwen3-30B-A3B. Gate and up: one wide program a multiprocessor, or two where
    few experts leave some without any. Down: two.
    """
    n, k = shape.outputs, shape.inputs
    wide = shape.fused and n % WIDE == 0 and num_tiles * (n // WIDE) >= PROGRAMS
    tile_n = WIDE if wide else next((size for size in (64, 32, 16) if n % size == 0), 0)
    tile_k = next((size for size in (128, 64, 32, 16) if size * element_bytes <= 256 and k % size == 0), 0)
    if not tile_n or not tile_k:
        return None
    stage = (tile_n * (2 if shape.fused else 1) + tile_m) * tile_k * element_bytes
    stages = min(SHARED_BYTES // stage, 6) if wide else min(SHARED_BYTES // 2 // stage, 4)
    warps = 8 if wide and tile_m > 32 else 4
    return Tiles(tile_n, tile_k, tile_m, max(stages, 2), 1, warps, prefetch=256 if k >= 256 else 0)


def rows_tiles_8bit(shape: ProductShape, tile_m: int, num_tiles: int) -> Tiles | None:
    """As rows_tiles, of W of 8 bits. A program of gate and up is as wide as the runs of codes that it leaves."""
    n, k = shape.outputs, shape.inputs
    if n % BLOCK or k % BLOCK:
        return None
    wide = shape.fused or num_tiles * (n // WIDE) >= PROGRAMS
    tile_n = WIDE if wide else NARROW
    stage = (tile_n * (2 if shape.fused else 1) + tile_m) * BLOCK
    stages = max(2, min(SHARED_BYTES // 2 // stage, 6))
    return Tiles(tile_n, BLOCK, tile_m, stages, 1, 8 if wide and tile_m > 32 else 4, prefetch=BLOCK)


def row_tiles_8bit(shape: ProductShape, blocked: bool) -> Tiles:
    """Tiles of W of 8 bits for one token; sizes are multiples of BLOCK. blocked: W has scales of blocks.

    Of 4 KiB, or of 8 where down has scales of blocks, three on their way: all programs of Qwen3-30B-A3B's experts, with
    which both products were timed together, fit an H200 at once, so 70 to 140 KiB are for each multiprocessor.
    """
    tile_k = next(size for size in ((256, 128) if blocked else (512, 256, 128)) if shape.inputs % size == 0)
    tile_n = (8192 if blocked and not shape.fused else 4096) // tile_k
    return Tiles(tile_n, tile_k, 0, 4, 1, 4, prefetch=0 if blocked or shape.fused else tile_k)


def row_tiles(shape: ProductShape) -> Tiles | None:
    """Tiles of W for one token; None: no tiles divide the shape."""
    n, k = shape.outputs, shape.inputs
    tile_k = next((size for size in (1024, 512, 256, 128, 64, 32, 16) if k % size == 0), 0)
    tile_n = max(2, 2048 // max(tile_k, 1)) if shape.fused else min(32, 8192 // max(tile_k, 1))
    if not tile_k or n % tile_n:
        return None
    return Tiles(tile_n, tile_k, 0, 1, 1, 4)
