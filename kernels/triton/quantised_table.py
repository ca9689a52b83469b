"""Tiles of products with quantised weights that were measured to be faster than those of the policies' rules.

    scripts/bench tune FILE --quantization fp8,int4 --rows 1,8,16,32,64 --layers 4

times them in whole decode steps; `chosen` lines are such entries, where they are ahead of `policy`. Below are an
H200's (docs/benchmarks/kernels.md). Pure data, by the rows of x in a tile. What a policy of equal bits takes is the
rules' alone, for entries may have other parts of K and groups of warps.
"""

from __future__ import annotations

from baton.kernels.triton.linear_policy import O_8B, ProductShape, Tiles

TILE_ROWS = 8, 16, 32, 64
"""Of x in a tile. More rows take several of the largest, and no entry."""
FORMATS = {
    "fp8_row": "fp8_row",
    "int8_row": "fp8_row",
    "int4_g128": "int4_g128",
    "int4_g128_zeros": "int4_g128",
    "int4_g128_ordered": "int4_g128",
    "int4_g128_zeros_ordered": "int4_g128",
}
"""Of weights, and under which name the table has them."""

# Rings of `o` that hold half of a program's blocks, or fewer warps, leave room for attention's programs beside them.
TABLE: dict[str, dict[int, dict[ProductShape, Tiles]]] = {
    "fp8_row": {
        16: {O_8B: Tiles(128, 128, 16, 4, 4)},
    },
    "int4_g128": {
        16: {O_8B: Tiles(128, 256, 16, 4, 4, 8)},
    },
}


def tabled(num_rows: int, shape: ProductShape) -> Tiles | None:
    """None: the table has no entry."""
    tile_m = next((size for size in TILE_ROWS if num_rows <= size), 0)
    of_format = TABLE.get(FORMATS.get(shape.weight_format, ""), {})
    return of_format.get(tile_m, {}).get(shape._replace(weight_format=ProductShape._field_defaults["weight_format"]))
