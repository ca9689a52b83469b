"""The context of some sequences out of a pool of 8-bit floats, as blocks of a plain pool of one layer: attention of
prompts reads that, whose kernels have no instruction to spare for widening each tile for each head and each query.

    out[first(s) + j, u, 0] = pool[table[s, j], u, layer] * scales      first(s) = sum over r < s of ceil(length[r] / T)
    out_table[s, j] = first(s) + j

Numbers are rounded to the plain pool's dtype once more: by 2**-9 of theirs in bfloat16, beside 2**-4 in 8 bits. Bytes:
of the context once in 8 bits and once in the other dtype.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import Launch, launch_nothing, next_power_of_2, require
from baton.kernels.triton.pool import TOKEN_SCALES, PagedPool

PROGRAMS = 4  # of a multiprocessor, which take blocks and heads in turn
ROWS = 64  # keys or values at a time


@triton.jit(do_not_specialize=["num_sequences", "layer", "unit_rows", "out_unit_rows"])
def _widen_kernel(
    pool_ptr, scale_ptr, table_ptr, length_ptr, out_ptr, out_table_ptr, num_sequences, layer, unit_rows, out_unit_rows,
    table_stride, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr, SCALES: tl.constexpr, SEQUENCES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.arange(0, SEQUENCES)
    lengths = tl.load(length_ptr + sequence, mask=sequence < num_sequences, other=0)
    counts = tl.cdiv(lengths, BLOCK_TOKENS)
    ends = tl.cumsum(counts, 0)
    element = tl.arange(0, DIM_BLOCK)
    for item in tl.range(tl.program_id(0), tl.sum(counts, 0) * KV_HEADS, tl.num_programs(0)):
        number = item // KV_HEADS
        head = item % KV_HEADS
        mine = tl.sum((ends <= number).to(tl.int32), 0)
        place = number - tl.sum(tl.where(sequence < mine, counts, 0), 0)
        block = tl.load(table_ptr + mine * table_stride + place)
        if head == 0:
            tl.store(out_table_ptr + mine * table_stride + place, number)
        first_row = (block * KV_HEADS + head).to(tl.int64) * unit_rows + layer * LAYER_ROWS
        out_row = (number * KV_HEADS + head).to(tl.int64) * out_unit_rows
        for start in tl.static_range(0, 2 * BLOCK_TOKENS, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < 2 * BLOCK_TOKENS)[:, None] & (element < DIM)[None, :]
            numbers = tl.load(pool_ptr + (first_row + row)[:, None] * DIM + element[None, :], mask=inside, other=0.0)
            if SCALES == TOKEN_SCALES:
                scale_at = scale_ptr + first_row * (DIM // 4) + row
            else:
                scale_at = scale_ptr + (layer * 2 + row // BLOCK_TOKENS) * KV_HEADS + head
            scales = tl.load(scale_at, mask=row < 2 * BLOCK_TOKENS, other=0.0)
            wide = numbers.to(tl.float32) * scales[:, None]
            out_at = out_ptr + (out_row + row)[:, None] * DIM + element[None, :]
            tl.store(out_at, wide.to(out_ptr.dtype.element_ty), mask=inside)


def widen_context(
    pool: PagedPool,
    layer: int,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    out: PagedPool,
    out_tables: torch.Tensor,
    num_sms: int,
) -> Callable[[int], None]:
    """Fills blocks of `out`, a pool of one layer, and out_tables, int32 like block_tables [S, blocks of the longest].

    lengths int32 [S], tokens in all, 0 for padding. `out` must have as many blocks as the sequences have together.
    Returns what does the same for another layer, in a fraction of the host's time.
    """
    same = (out.num_units, out.block_tokens, out.head_dim) == (pool.num_units, pool.block_tokens, pool.head_dim)
    require(same and out.num_layers == 1 and out.scales is None, "out is no plain pool of one layer of this shape")
    require(pool.scales is not None, f"a pool of {pool.dtype} needs no widening")
    require(out_tables.shape == block_tables.shape, "tables differ in shape")
    require(out_tables.stride() == block_tables.stride() and block_tables.stride(1) == 1, "tables differ in strides")
    require(block_tables.dtype == out_tables.dtype == lengths.dtype == torch.int32, "tables and lengths must be int32")
    require(len(lengths) == len(block_tables) and lengths.is_contiguous(), "lengths need one a row of the tables")
    if not len(lengths):
        return launch_nothing
    launch = Launch(
        _widen_kernel,
        (PROGRAMS * num_sms,),
        pool.tensor,
        pool.scales,
        block_tables,
        lengths,
        out.tensor,
        out_tables,
        len(lengths),
        layer,
        pool.unit_rows,
        out.unit_rows,
        block_tables.stride(0),
        KV_HEADS=pool.num_units,
        DIM=pool.head_dim,
        DIM_BLOCK=next_power_of_2(pool.head_dim),
        BLOCK_TOKENS=pool.block_tokens,
        LAYER_ROWS=pool.layer_rows,
        SCALES=pool.scale_mode,
        SEQUENCES=next_power_of_2(len(lengths)),
        ROWS=ROWS,
        num_warps=8,
    )

    def of_layer(layer: int) -> None:
        pool.require_layer(layer)
        launch(layer=layer)

    of_layer(layer)
    return of_layer
