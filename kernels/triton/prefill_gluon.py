"""Causal attention of new tokens over the paged pool on Hopper, in Gluon: the fast path of prefill_attention.

The structure of FlashAttention-3 (Shah et al., 2024). A program has one warp that loads (TMA) and two warpgroups that
compute 64 query tokens each; a tile is 128 tokens by TILE keys. In a warpgroup the product with the keys of tile i and
that with the values of tile i - 1 are both in flight while the softmax of tile i runs, and the two groups take turns
at issuing their products. What mattered, each measured or read in the machine code (docs/benchmarks/kernels.md):
  * _pin: without it the exponentials sink below the wait for the product with the values, and nothing overlaps.
  * Weights are carried in float32 and converted after the next product is issued; carried in bfloat16 they cost 64
    instructions a tile.
  * Blocks of 16 to 128 tokens arrive as boxes of [block, 64] inside the swizzled tile: one tile size serves all.
Items come from prefill_attention.work_list. With `counter` the grid is as large as the GPU and programs take items from
a counter, which the last one sets back: better from about two items a multiprocessor on.

Gluon is experimental and changes between Triton's versions: `is_available` says whether this one is known to work.
bfloat16, head_dim 128, no window. Formula, bytes and the finite pool: see prefill_attention.
"""
# mypy: ignore-errors

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from baton.kernels.triton.gluon_boxes import boxes
from baton.kernels.triton.launch import Launch, launch_nothing, require
from baton.kernels.triton.pool import PagedPool

BLOCK_M, TILE, BUFFERS, REGISTERS = 128, 128, 2, 240


def is_available(capability: tuple[int, int]) -> bool:
    """Whether the kernel runs with this Triton on a GPU of this compute capability; else take prefill_attention."""
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return capability == (9, 0) and (3, 6) <= (major, minor) < (3, 9)


def reads(pool: PagedPool) -> bool:
    """Whether the kernel attends to such a pool."""
    return pool.dtype == torch.bfloat16 and pool.head_dim == 128 and pool.block_tokens in (16, 32, 64, 128)


@gluon.jit
def _producer(
    query_desc, pool_desc, out_desc, out_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, turns, item_tile, counter_ptr, work_ptr, n_items, query_start_ptr, length_ptr, table_ptr,
    table_stride, layer_row, scale_log2, unit_rows, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr, BLOCK_M: gl.constexpr, TILE: gl.constexpr, BUFFERS: gl.constexpr,
    PING_PONG: gl.constexpr, PERSISTENT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    BOX: gl.constexpr = BLOCK_TOKENS if BLOCK_TOKENS < TILE else TILE
    PIECES: gl.constexpr = TILE // BOX
    HALVES: gl.constexpr = DIM // 64
    box_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BOX, 64], gl.bfloat16)
    k_boxes = k_tiles._reinterpret(gl.bfloat16, [BUFFERS * HALVES * PIECES, BOX, 64], box_layout)
    v_boxes = v_tiles._reinterpret(gl.bfloat16, [BUFFERS * HALVES * PIECES, BOX, 64], box_layout)
    block_rows = KV_HEADS * unit_rows
    loaded = 0
    item = 0
    work = gl.program_id(0)
    while work < n_items:
        next_work = work + gl.num_programs(0)
        if PERSISTENT:
            next_work = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0)
        sequence = gl.load(work_ptr + work * 3)
        tile_m = gl.load(work_ptr + work * 3 + 1)
        head = gl.load(work_ptr + work * 3 + 2)
        query_start = gl.load(query_start_ptr + sequence)
        query_end = gl.load(query_start_ptr + sequence + 1)
        length = gl.load(length_ptr + sequence)
        cached = length - (query_end - query_start)
        num_tiles = gl.cdiv(gl.minimum(cached + (tile_m + 1) * BLOCK_M, length), TILE)
        first_row = head // (HEADS // KV_HEADS) * unit_rows + layer_row
        mbarrier.wait(q_empty, (item & 1) ^ 1)
        if PERSISTENT:
            item_tile.store(gl.full([1], work, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.expect(q_full, 2 * ROWS * DIM * 2)
        tma.async_copy_global_to_shared(
            query_desc, [query_start + tile_m * BLOCK_M, head * DIM], q_full, q_tiles.index(0)
        )
        tma.async_copy_global_to_shared(
            query_desc, [query_start + tile_m * BLOCK_M + ROWS, head * DIM], q_full, q_tiles.index(1)
        )
        item += 1
        for i in range(num_tiles):
            n = (num_tiles - 1 - i) * TILE
            b = loaded % BUFFERS
            phase = (loaded // BUFFERS) & 1
            mbarrier.wait(k_empty.index(b), phase ^ 1)
            mbarrier.expect(k_full.index(b), TILE * DIM * 2)
            for piece in gl.static_range(PIECES):
                token = gl.minimum(n + piece * BOX, length - 1)
                slot = (
                    gl.load(table_ptr + sequence * table_stride + token // BLOCK_TOKENS) * block_rows
                    + first_row
                    + (n + piece * BOX) % BLOCK_TOKENS
                )
                for half in gl.static_range(HALVES):
                    tma.async_copy_global_to_shared(
                        pool_desc,
                        [slot, half * 64],
                        k_full.index(b),
                        k_boxes.index((b * HALVES + half) * PIECES + piece),
                    )
            mbarrier.wait(v_empty.index(b), phase ^ 1)
            mbarrier.expect(v_full.index(b), TILE * DIM * 2)
            for piece in gl.static_range(PIECES):
                token = gl.minimum(n + piece * BOX, length - 1)
                slot = (
                    gl.load(table_ptr + sequence * table_stride + token // BLOCK_TOKENS) * block_rows
                    + first_row
                    + BLOCK_TOKENS
                    + (n + piece * BOX) % BLOCK_TOKENS
                )
                for half in gl.static_range(HALVES):
                    tma.async_copy_global_to_shared(
                        pool_desc,
                        [slot, half * 64],
                        v_full.index(b),
                        v_boxes.index((b * HALVES + half) * PIECES + piece),
                    )
            loaded += 1
        work = next_work
    if PERSISTENT:
        mbarrier.wait(q_empty, (item & 1) ^ 1)
        item_tile.store(gl.full([1], -1, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(q_full, count=1)
        if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:  # the last program sets the counters back
            gl.store(counter_ptr, 0)
            gl.store(counter_ptr + 1, 0)


@gluon.jit
def _softmax(scores, top, total, scale_log2):
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _pin(total):
    """Identity on the row sums, with a side effect that ptxas does not move across a wgmma wait."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0fFF7FFFFF; @p nanosleep.u32 1; mov.b32 $0, $1; }",
        "=f,f",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _consumer(
    query_desc, pool_desc, out_desc, out_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, turns, item_tile, counter_ptr, work_ptr, n_items, query_start_ptr, length_ptr, table_ptr,
    table_stride, layer_row, scale_log2, unit_rows, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr, BLOCK_M: gl.constexpr, TILE: gl.constexpr, BUFFERS: gl.constexpr,
    PING_PONG: gl.constexpr, PERSISTENT: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    zeros = gl.zeros([ROWS, TILE], gl.float32, layout=SCORES)
    q = q_tiles.index(GROUP)
    loaded = 0
    item = 0
    work = gl.program_id(0)
    mbarrier.wait(q_full, 0)
    while work < n_items:
        sequence = gl.load(work_ptr + work * 3)
        tile_m = gl.load(work_ptr + work * 3 + 1)
        head = gl.load(work_ptr + work * 3 + 2)
        query_start = gl.load(query_start_ptr + sequence)
        query_end = gl.load(query_start_ptr + sequence + 1)
        length = gl.load(length_ptr + sequence)
        cached = length - (query_end - query_start)
        num_tiles = gl.cdiv(gl.minimum(cached + (tile_m + 1) * BLOCK_M, length), TILE)
        num_unmasked = gl.minimum((cached + tile_m * BLOCK_M + GROUP * ROWS + 1) // TILE, num_tiles)
        positions = cached + tile_m * BLOCK_M + GROUP * ROWS + gl.arange(0, ROWS, layout=ROW)
        top = gl.full([ROWS], -1e30, gl.float32, layout=ROW)
        total = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=OUT)
        b = loaded % BUFFERS
        mbarrier.wait(k_full.index(b), (loaded // BUFFERS) & 1)
        if PING_PONG:
            mbarrier.wait(turns.index(GROUP), (loaded & 1) ^ (1 - GROUP))
        new_scores = warpgroup_mma(q, k_tiles.index(b).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if PING_PONG:
            mbarrier.arrive(turns.index(1 - GROUP), count=1)
        scores = warpgroup_mma_wait(0, deps=[new_scores])
        mbarrier.arrive(k_empty.index(b), count=1)
        scores = gl.where(((num_tiles - 1) * TILE + columns)[None, :] <= positions[:, None], scores, -1e30)
        weights, top, total, shrink = _softmax(scores, top, total, scale_log2)
        for i in range(1, num_tiles - num_unmasked):
            value_buffer = loaded % BUFFERS
            value_phase = (loaded // BUFFERS) & 1
            loaded += 1
            b = loaded % BUFFERS
            mbarrier.wait(k_full.index(b), (loaded // BUFFERS) & 1)
            if PING_PONG:
                mbarrier.wait(turns.index(GROUP), (loaded & 1) ^ (1 - GROUP))
            new_scores = warpgroup_mma(q, k_tiles.index(b).permute((1, 0)), zeros, use_acc=False, is_async=True)
            probs = gl.convert_layout(weights.to(gl.bfloat16), PROBS)
            mbarrier.wait(v_full.index(value_buffer), value_phase)
            new_acc = warpgroup_mma(probs, v_tiles.index(value_buffer), acc, is_async=True)
            if PING_PONG:
                mbarrier.arrive(turns.index(1 - GROUP), count=1)
            scores = warpgroup_mma_wait(1, deps=[new_scores])
            mbarrier.arrive(k_empty.index(b), count=1)
            scores = gl.where(((num_tiles - 1 - i) * TILE + columns)[None, :] <= positions[:, None], scores, -1e30)
            weights, top, total, shrink = _softmax(scores, top, total, scale_log2)
            total = _pin(total)
            acc = warpgroup_mma_wait(0, deps=[new_acc])
            mbarrier.arrive(v_empty.index(value_buffer), count=1)
            acc = acc * gl.convert_layout(shrink, OUT_ROW)[:, None]
        for _ in range(gl.maximum(num_tiles - num_unmasked, 1), num_tiles):
            value_buffer = loaded % BUFFERS
            value_phase = (loaded // BUFFERS) & 1
            loaded += 1
            b = loaded % BUFFERS
            mbarrier.wait(k_full.index(b), (loaded // BUFFERS) & 1)
            if PING_PONG:
                mbarrier.wait(turns.index(GROUP), (loaded & 1) ^ (1 - GROUP))
            new_scores = warpgroup_mma(q, k_tiles.index(b).permute((1, 0)), zeros, use_acc=False, is_async=True)
            probs = gl.convert_layout(weights.to(gl.bfloat16), PROBS)
            mbarrier.wait(v_full.index(value_buffer), value_phase)
            new_acc = warpgroup_mma(probs, v_tiles.index(value_buffer), acc, is_async=True)
            if PING_PONG:
                mbarrier.arrive(turns.index(1 - GROUP), count=1)
            scores = warpgroup_mma_wait(1, deps=[new_scores])
            mbarrier.arrive(k_empty.index(b), count=1)
            weights, top, total, shrink = _softmax(scores, top, total, scale_log2)
            total = _pin(total)
            acc = warpgroup_mma_wait(0, deps=[new_acc])
            mbarrier.arrive(v_empty.index(value_buffer), count=1)
            acc = acc * gl.convert_layout(shrink, OUT_ROW)[:, None]
        mbarrier.arrive(q_empty, count=1)
        value_buffer = loaded % BUFFERS
        probs = gl.convert_layout(weights.to(gl.bfloat16), PROBS)
        mbarrier.wait(v_full.index(value_buffer), (loaded // BUFFERS) & 1)
        new_acc = warpgroup_mma(probs, v_tiles.index(value_buffer), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[new_acc])
        mbarrier.arrive(v_empty.index(value_buffer), count=1)
        loaded += 1
        item += 1
        acc = acc * (1.0 / gl.convert_layout(total, OUT_ROW))[:, None]
        first_row = query_start + tile_m * BLOCK_M + GROUP * ROWS
        result = acc.to(gl.bfloat16)
        if first_row + ROWS <= query_end:
            tma.store_wait(0)
            out_tiles.index(GROUP).store(result)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [first_row, head * DIM], out_tiles.index(GROUP))
        else:
            out_rows = first_row + gl.arange(0, ROWS, layout=OUT_ROW)
            out_columns = head * DIM + gl.arange(0, DIM, layout=gl.SliceLayout(0, OUT))
            gl.store(
                out_ptr + out_rows.to(gl.int64)[:, None] * (HEADS * DIM) + out_columns[None, :],
                result,
                mask=(out_rows < query_end)[:, None],
            )
        if PERSISTENT:
            mbarrier.wait(q_full, item & 1)
            work = gl.max(item_tile.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
            if work < 0:
                work = n_items
        else:
            work += gl.num_programs(0)
            if work < n_items:
                mbarrier.wait(q_full, item & 1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_items", "layer_row", "scale_log2", "unit_rows"])
def _prefill_kernel(
    query_desc, pool_desc, out_desc, out_ptr, counter_ptr, work_ptr, n_items, query_start_ptr, length_ptr, table_ptr,
    table_stride, layer_row, scale_log2, unit_rows, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr, BLOCK_M: gl.constexpr, TILE: gl.constexpr, BUFFERS: gl.constexpr,
    PING_PONG: gl.constexpr, PERSISTENT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], gl.bfloat16)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, DIM], gl.bfloat16)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, DIM], q_layout)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, DIM], q_layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, DIM], k_layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, TILE, DIM], k_layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], bar)
    item_tile = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    query_desc, pool_desc, out_desc, out_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty,
                    k_full, k_empty, v_full, v_empty, turns, item_tile, counter_ptr, work_ptr, n_items,
                    query_start_ptr, length_ptr, table_ptr, table_stride, layer_row, scale_log2, unit_rows, HEADS,
                    KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_M, TILE, BUFFERS, PING_PONG, PERSISTENT, 0,
                ),
            ),
            (
                _consumer,
                (
                    query_desc, pool_desc, out_desc, out_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty,
                    k_full, k_empty, v_full, v_empty, turns, item_tile, counter_ptr, work_ptr, n_items,
                    query_start_ptr, length_ptr, table_ptr, table_stride, layer_row, scale_log2, unit_rows, HEADS,
                    KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_M, TILE, BUFFERS, PING_PONG, PERSISTENT, 1,
                ),
            ),
            (
                _producer,
                (
                    query_desc, pool_desc, out_desc, out_ptr, q_tiles, k_tiles, v_tiles, out_tiles, q_full, q_empty,
                    k_full, k_empty, v_full, v_empty, turns, item_tile, counter_ptr, work_ptr, n_items,
                    query_start_ptr, length_ptr, table_ptr, table_stride, layer_row, scale_log2, unit_rows, HEADS,
                    KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_M, TILE, BUFFERS, PING_PONG, PERSISTENT, 0,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def prefill_attention(
    query: torch.Tensor,
    pool: PagedPool,
    layer: int,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    work: torch.Tensor,
    num_sms: int,
    counter: torch.Tensor | None,
    out: torch.Tensor,
) -> Callable[[int], None]:
    """As prefill_attention.prefill_attention with tiles of BLOCK_M tokens; what it returns needs no sinks.

    counter: int32 [2], all zero before and after, not shared by launches that may overlap; None: a program an item.
    """
    num_tokens, num_heads, head_dim = query.shape
    kv_heads, block_tokens = pool.num_units, pool.block_tokens
    require(query.shape == out.shape and pool.head_dim == head_dim == 128, "query, out and pool must have head_dim 128")
    require(query.dtype == out.dtype == torch.bfloat16, "query and out must be bfloat16")
    require(reads(pool), f"the kernel reads no pool of {pool.dtype} with blocks of {block_tokens} tokens")
    require(num_heads % kv_heads == 0, f"{num_heads} on {kv_heads} heads")
    require(query_starts.shape[0] - 1 == lengths.shape[0] == block_tables.shape[0], "a row for each sequence")
    require(block_tables.stride(1) == 1 and work.dim() == 2 and work.shape[1] == 3, "work is not [items, 3]")
    for integers in (block_tables, query_starts, lengths, work):
        require(integers.dtype == torch.int32, "tables, starts, lengths and work must be int32")
    for tensor in (query, out, query_starts, lengths, work):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    num_items = work.shape[0]
    if num_items == 0:
        return launch_nothing
    launch = Launch(
        _prefill_kernel,
        (num_items if counter is None else min(num_sms, num_items),),
        boxes(query.view(num_tokens, -1), BLOCK_M // 2, head_dim),
        boxes(pool.rows, min(block_tokens, TILE), 64),
        boxes(out.view(num_tokens, -1), BLOCK_M // 2, head_dim),
        out,
        counter,
        work,
        num_items,
        query_starts,
        lengths,
        block_tables,
        block_tables.stride(0),
        0,  # the layer's
        head_dim**-0.5 * math.log2(math.e),  # no other: see LOWEST in prefill_attention
        pool.unit_rows,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        BLOCK_M=BLOCK_M,
        TILE=TILE,
        BUFFERS=BUFFERS,
        PING_PONG=True,
        PERSISTENT=counter is not None,
        REGISTERS=REGISTERS,
        num_warps=4,
    )

    def of_layer(layer: int) -> None:
        pool.require_layer(layer)
        launch(layer_row=layer * 2 * block_tokens)

    of_layer(layer)
    return of_layer
