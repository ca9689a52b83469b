"""Which kernel does a product y = x W^T of a shape, and how it is cut: measured, by tables, and for one row of x, where
no table has a large shape (a rank's part of a model, mostly), by a rule that is taken from the tables.

A shape or a number of rows that is in none of them is cuBLAS's (None), or where `gated_by_gluon` says so
product_gluon's. Pure data; imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ProductShape(NamedTuple):
    """What a kernel is chosen by, beside the number of rows of x."""

    outputs: int
    inputs: int
    fused: bool = False
    """The product of gate and up together with silu(gate) * up, whose W has 2 * outputs rows."""
    weight_format: str = "dense"
    """As kernels.linear names it."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """One row of the table. The kernel reads tile_n rows of W, tile_k columns at a time, for tile_m rows of x."""

    tile_n: int
    tile_k: int
    tile_m: int
    """0: the kernel for a single row of x, which uses no matrix instructions."""
    stages: int
    splits: int
    """Parts of K that are summed by the kernel which reads the result; 1 writes the result itself."""
    warps: int = 4
    prefetch: int = 256
    """Columns of W asked for before the kernel before has ended (with pdl)."""


QKV_8B, O_8B, GATE_UP_8B, DOWN_8B, HEAD_8B = (
    ProductShape(6144, 4096),
    ProductShape(4096, 4096),
    ProductShape(14336, 4096, fused=True),
    ProductShape(4096, 14336),
    ProductShape(128256, 4096),
)
QKV_30B = ProductShape(5120, 2048)
"""Of Qwen3-30B-A3B."""
QKV_GEMMA, O_GEMMA, GATE_UP_GEMMA, DOWN_GEMMA, HEAD_GEMMA = (
    ProductShape(8192, 3584),
    ProductShape(3584, 4096),
    ProductShape(14336, 3584, fused=True),
    ProductShape(3584, 14336),
    ProductShape(256000, 3584),
)
"""Of Gemma-2-9B; gate and up meet with gelu_tanh."""
QKV_PHI, O_PHI, GATE_UP_PHI, DOWN_PHI, HEAD_PHI = (
    ProductShape(7680, 5120),
    ProductShape(5120, 5120),
    ProductShape(17920, 5120, fused=True),
    ProductShape(5120, 17920),
    ProductShape(100352, 5120),
)
"""Of Phi-4 (14B)."""
LIKE: dict[ProductShape, ProductShape] = {
    ProductShape(12288, 4096, fused=True): GATE_UP_8B,
    ProductShape(4096, 12288): DOWN_8B,
    ProductShape(151936, 4096): HEAD_8B,
    QKV_30B: QKV_8B,
    ProductShape(2048, 4096): O_8B,
    ProductShape(151936, 2048): HEAD_8B,
    ProductShape(32000, 4096): HEAD_8B,
    ProductShape(3072, 4096): QKV_8B,
    ProductShape(4096, 2048): O_8B,
    ProductShape(7168, 4096, fused=True): GATE_UP_8B,
    ProductShape(4096, 7168): DOWN_8B,
    ProductShape(64128, 4096): HEAD_8B,
}
"""Shapes of Qwen3-8B, of Qwen3-30B-A3B, of Mixtral-8x7B and of one of two ranks of Llama-3.1-8B, which take the tiles
of those beside them, unless a table has tiles of their own; the others are the same."""

# Measured on an H200 (docs/benchmarks/kernels.md). By the largest number of rows, then by shape.
FASTEST: dict[int, dict[ProductShape, Tiles]] = {
    1: {
        QKV_8B: Tiles(2, 4096, 0, 1, 1, 8),
        QKV_30B: Tiles(2, 2048, 0, 1, 1, 8),
        O_8B: Tiles(1, 4096, 0, 1, 1, 4),
        GATE_UP_8B: Tiles(2, 2048, 0, 1, 1, 4),
        DOWN_8B: Tiles(16, 512, 0, 1, 1, 8),
        HEAD_8B: Tiles(2, 2048, 0, 1, 1, 4),
        QKV_GEMMA: Tiles(4, 512, 0, 1, 1, 4),
        O_GEMMA: Tiles(2, 2048, 0, 1, 1, 8),
        GATE_UP_GEMMA: Tiles(4, 512, 0, 1, 1, 8),
        DOWN_GEMMA: Tiles(2, 1024, 0, 1, 1, 8),
        HEAD_GEMMA: Tiles(4, 512, 0, 1, 1, 4),
        QKV_PHI: Tiles(2, 1024, 0, 1, 1, 4),
        O_PHI: Tiles(2, 1024, 0, 1, 1, 4),
        GATE_UP_PHI: Tiles(2, 512, 0, 1, 1, 4),
        DOWN_PHI: Tiles(4, 512, 0, 1, 1, 8),
        HEAD_PHI: Tiles(4, 1024, 0, 1, 1, 8),
    },
    16: {
        QKV_8B: Tiles(64, 128, 16, 5, 2),
        O_8B: Tiles(64, 128, 16, 5, 4),
        GATE_UP_8B: Tiles(64, 128, 16, 5, 1),
        DOWN_8B: Tiles(64, 256, 16, 5, 2),
        HEAD_8B: Tiles(128, 128, 16, 3, 1),
    },
    32: {
        QKV_8B: Tiles(64, 128, 32, 4, 2),
        O_8B: Tiles(64, 256, 32, 4, 2),
        GATE_UP_8B: Tiles(64, 128, 32, 5, 1),
        DOWN_8B: Tiles(64, 256, 32, 4, 2),
        HEAD_8B: Tiles(128, 128, 32, 5, 1),
    },
    64: {
        QKV_8B: Tiles(64, 128, 64, 6, 1),
        O_8B: Tiles(64, 256, 64, 3, 2),
        GATE_UP_8B: Tiles(64, 128, 64, 4, 1, prefetch=0),
        DOWN_8B: Tiles(64, 128, 64, 6, 2),
        HEAD_8B: Tiles(128, 128, 64, 4, 1, 8),
    },
    128: {
        O_8B: Tiles(64, 128, 128, 4, 2),
        GATE_UP_8B: Tiles(64, 64, 128, 3, 1, prefetch=0),
        DOWN_8B: Tiles(64, 128, 128, 4, 2),
    },
}

# One number of splits a weight for every number of rows: a row's bits do not depend on the batch. Each table entry
# sums K in steps of 16 in one order, so other tiles do not change the bits.
INVARIANT: dict[int, dict[ProductShape, Tiles]] = {
    16: {
        QKV_8B: Tiles(64, 128, 16, 5, 2),
        O_8B: Tiles(64, 128, 16, 5, 4),
        GATE_UP_8B: Tiles(64, 128, 16, 5, 1),
        DOWN_8B: Tiles(64, 128, 16, 5, 4),
        HEAD_8B: Tiles(128, 128, 16, 3, 1),
    },
    32: {
        QKV_8B: Tiles(64, 128, 32, 4, 2),
        O_8B: Tiles(64, 128, 32, 4, 4),
        GATE_UP_8B: Tiles(64, 128, 32, 5, 1),
        DOWN_8B: Tiles(64, 128, 32, 4, 4),
        HEAD_8B: Tiles(128, 128, 32, 5, 1),
    },
    64: {
        QKV_8B: Tiles(64, 128, 64, 3, 2),
        O_8B: Tiles(64, 128, 64, 3, 4),
        GATE_UP_8B: Tiles(64, 128, 64, 4, 1),
        DOWN_8B: Tiles(64, 128, 64, 3, 4),
        HEAD_8B: Tiles(128, 128, 64, 4, 1, 8),
    },
    128: {
        QKV_8B: Tiles(64, 64, 128, 4, 2),
        O_8B: Tiles(64, 64, 128, 4, 4),
        GATE_UP_8B: Tiles(64, 64, 128, 3, 1),
        DOWN_8B: Tiles(64, 64, 128, 4, 4),
        HEAD_8B: Tiles(128, 64, 128, 3, 1, 8),
    },
    256: {
        QKV_8B: Tiles(64, 64, 256, 5, 2),
        O_8B: Tiles(64, 64, 256, 5, 4),
        GATE_UP_8B: Tiles(128, 64, 128, 4, 1, 8),
        DOWN_8B: Tiles(64, 64, 256, 5, 4),
        HEAD_8B: Tiles(128, 64, 256, 4, 1, 8),
    },
}


GATED_BY_GLUON: dict[ProductShape, int] = {GATE_UP_8B: 1024}
"""The fewest rows from which product_gluon is ahead of cuBLAS with silu * mul behind it."""


def fastest(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The fastest way for num_rows rows of x; None: cuBLAS."""
    return _look_up(FASTEST, num_rows, shape) or (_one_row(shape) if num_rows == 1 else None)


def invariant(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The way whose bits do not depend on num_rows; None: not known for this shape or so many rows."""
    return _look_up(INVARIANT, num_rows, shape)


def gated_by_gluon(num_rows: int, shape: ProductShape) -> bool:
    """Whether product_gluon, where it runs, is the fastest way for a shape that is fused."""
    least = GATED_BY_GLUON.get(LIKE.get(shape, shape))
    return least is not None and num_rows >= least


def _look_up(table: dict[int, dict[ProductShape, Tiles]], num_rows: int, shape: ProductShape) -> Tiles | None:
    bucket = next((rows for rows in sorted(table) if num_rows <= rows), None)
    if bucket is None:
        return None
    own, like = table[bucket].get(shape), table[bucket].get(LIKE.get(shape, shape))
    return own or (like if like is not None and _fits(like, shape) else None)


def _fits(tiles: Tiles, shape: ProductShape) -> bool:
    return shape.outputs % tiles.tile_n == 0 and shape.inputs % (tiles.tile_k * tiles.splits) == 0


LEAST_INPUTS, LEAST_ELEMENTS = 1024, 1 << 21
"""Of a weight that the rule is for."""


def _one_row(shape: ProductShape) -> Tiles | None:
    """A program reads 2,048 columns of two rows of W at a time, or as many numbers where these do not divide K."""
    if shape.inputs < LEAST_INPUTS or shape.outputs * shape.inputs < LEAST_ELEMENTS:
        return None
    tile_k = next((size for size in (2048, 1024, 512) if shape.inputs % size == 0), None)
    if tile_k is None:
        return None
    tile_n = 2 * 2048 // tile_k
    tiles = Tiles(tile_n, tile_k, 0, 1, 1, 8 if tile_n > 4 else 4)
    return tiles if _fits(tiles, shape) else None
