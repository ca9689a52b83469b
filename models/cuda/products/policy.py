"""How a product runs, by its shape and number of rows: the policy of speed, and that of bits that no batch changes."""

from __future__ import annotations

from collections.abc import Callable

from baton.kernels import Linear
from baton.kernels.triton import int4_policy, linear_8bit_policy, linear_policy
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.node.errors import SettingsError

Policy = Callable[[int, ProductShape], Tiles | None]

TABLED_ROWS = (1, 16, 32, 64, 128, 256)
"""The tables end at the last; more rows are cuBLAS's or, gate and up, product_gluon's. In a deterministic run they are
cut into tiles of so many."""


PADDING = 4
"""Rows of memory behind what a step computes, for products that take a multiple of so many."""


def fastest(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The policy of speed."""
    if shape.weight_format.startswith(int4_policy.PREFIX):
        return int4_policy.fastest(num_rows, shape)
    if shape.weight_format in linear_8bit_policy.FORMATS:
        return linear_8bit_policy.fastest(num_rows, shape)
    return linear_policy.fastest(num_rows, shape)


def invariant(num_rows: int, shape: ProductShape) -> Tiles | None:
    """The policy whose bits do not depend on num_rows: one number of splits for every number of rows, never cuBLAS.

    Shapes that were not measured get tiles that fit, untuned. None: dequantise first, every number of rows.
    """
    if shape.weight_format.startswith(int4_policy.PREFIX):
        return int4_policy.invariant(num_rows, shape)
    if shape.weight_format in linear_8bit_policy.FORMATS:
        return linear_8bit_policy.invariant(num_rows, shape)
    return linear_policy.invariant(min(num_rows, TABLED_ROWS[-1]), shape) or untuned(num_rows, shape)


def untuned(num_rows: int, shape: ProductShape) -> Tiles:
    """Tiles for any shape: the largest that divide it, and one split. SettingsError if none does."""
    n, k = shape.outputs, shape.inputs
    tile_n = next((size for size in (64, 32, 16) if n % size == 0), 0)
    tile_k = next((size for size in (64, 32, 16) if k % size == 0), 0)
    if not tile_n or not tile_k:
        raise SettingsError(f"--deterministic: no tiles fit a product of {k} inputs and {n} outputs")
    tile_m = next((size for size in (16, 32, 64) if num_rows <= size), 128)
    return Tiles(tile_n, tile_k, tile_m, 3, 1, prefetch=0)


def shape_of(weights: Linear, fused: bool = False) -> ProductShape:
    """The key of a product in the policies; `fused`: of gate and up, with silu(gate) * up behind it."""
    outputs = weights.num_outputs // 2 if fused else weights.num_outputs
    return ProductShape(outputs, weights.num_inputs, fused, weights.weight_format)
