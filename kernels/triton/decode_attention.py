"""Attention of one new token a sequence over its tokens in the paged pool, cut into chunks (split-KV, flash decoding).

    out[b, h] = sum_t softmax_t(scale * query[b, h] . key[t, h // group]) value[t, h // group],  t < length[b]
    with sinks the softmax has one term more, exp(sink[h]), in its denominator alone

The query heads that share a key head are the rows of one matrix product, so keys and values are read once; where these
are few, so are the tokens of a sequence that are verified together, each up to its own length. Softmax is
kept as a running maximum and sum (Milakov, Gimelshein 2018; Dao et al., FlashAttention, 2022), in float32 with base 2.
A program does one chunk of one sequence and key head; `decode_work` says which. Where a sequence has several, each
program leaves its part in the scratch, and the one that ends last, found by a counter that it sets back to zero, merges
the parts in the order of the chunks: the order of arrival does not matter, and no float is added atomically. With
chunks of one size a row's bits do not depend on the batch (`decode_plan.fixed_plan`).

Of 8-bit floats with scales the products are those of the stored numbers, which the query's dtype holds exactly; the
scales of keys multiply scores, and those of values the weights.

Bytes: the keys and values, 2 * sum(length) * KH * D * element size. Blocks of 64 tokens and more arrive by TMA.
The pool must be finite everywhere: what lies past a sequence's end in its last tile is multiplied by 0, not skipped.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.decode_fp8 import decode_fp8_attention_kernel
from baton.kernels.triton.decode_merge import merge_by_the_last, sink_weights
from baton.kernels.triton.decode_plan import GROUP_ROWS, TILE, DecodePlan, merged_parts, queries_of
from baton.kernels.triton.decode_work import CHUNK, COLUMNS, END, FIRST, FOLLOWING, PARTS, QUERIES, ROW, START
from baton.kernels.triton.launch import Launch, launch_nothing, launch_options, next_power_of_2, require
from baton.kernels.triton.pool import STATIC_SCALES, TOKEN_SCALES, PagedPool
from baton.kernels.triton.softcap import bounded, limit_log2

HEAD_BYTES, FP8_HEAD_BYTES = 256, 128  # of the heads that plans are made for; of larger ones fewer tiles are in flight
FP8_DIM = 64  # elements of the smallest heads whose words fill matrix instructions
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What a step's chunks are, and where programs leave their parts; made once, for the largest step. Kernels leave
    `arrived` all zero."""

    work: torch.Tensor  # int32 [chunks, COLUMNS], see decode_work
    parts: torch.Tensor  # float32 [KH * parts * group * D]
    softmax: torch.Tensor  # float32 [KH * parts * 2 * group]: maximum and sum
    arrived: torch.Tensor  # int32 [rows * KH]

    @classmethod
    def make(cls, num_rows: int, num_parts: int, num_heads: int, kv_heads: int, head_dim: int, device) -> DecodeScratch:
        """Room for plans of up to num_parts over up to num_rows tokens."""
        heads = num_parts * num_heads
        return cls(
            torch.zeros(num_parts, COLUMNS.value, dtype=torch.int32, device=device),
            torch.zeros(heads * head_dim, dtype=torch.float32, device=device),
            torch.zeros(heads * 2, dtype=torch.float32, device=device),
            torch.zeros(num_rows * kv_heads, dtype=torch.int32, device=device),
        )


@triton.jit(do_not_specialize=["layer", "unit_rows", "scale_log2", "window", "num_parts"])
def _decode_attention_kernel(
    query_ptr,
    pool_desc,
    pool_ptr,
    scale_ptr,
    table_ptr,
    length_ptr,
    work_ptr,
    out_ptr,
    parts_ptr,
    softmax_ptr,
    arrived_ptr,
    sink_ptr,
    scale_log2,
    layer,
    unit_rows,
    table_stride,
    window,
    num_parts,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SINKS: tl.constexpr,
    TMA: tl.constexpr,
    WINDOWED: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    number = tl.program_id(0) // KV_HEADS
    GROUP: tl.constexpr = HEADS // KV_HEADS
    each = tl.arange(0, ROWS)  # head of a query
    number_of_query = each // GROUP
    element = tl.arange(0, DIM_BLOCK)
    chunk = work_ptr + number * COLUMNS  # not written by the kernels of a layer, nor are lengths: before the wait
    row = tl.load(chunk + ROW)
    start = tl.load(chunk + START)
    end = tl.load(chunk + END)
    chunk_tokens = tl.load(chunk + CHUNK)
    queries = tl.load(chunk + QUERIES)
    following = tl.load(chunk + FOLLOWING)
    own_chunk, first, first_chunk = 0, 0, 0
    limit = tl.zeros_like(each)
    if start < end:
        own_chunk = start // chunk_tokens
        limit = tl.load(length_ptr + row) + number_of_query
        if WINDOWED:
            first = tl.maximum(tl.min(limit, 0) - window, 0)
            first_chunk = first // chunk_tokens
            start = tl.maximum(start, first)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if start < end:
        own_row = tl.where(number_of_query == 0, row, following + number_of_query - 1)
        heads_at = (own_row * HEADS + kv_head * GROUP + each % GROUP) * DIM
        computes = each < queries * GROUP
        inside = computes[:, None] & (element < DIM)[None, :]
        query = tl.load(query_ptr + heads_at[:, None] + element[None, :], mask=inside, other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
        block_rows = KV_HEADS * unit_rows
        first_row = kv_head * unit_rows + layer * LAYER_ROWS
        if SCALES == STATIC_SCALES:
            scale_log2 *= tl.load(scale_ptr + layer * 2 * KV_HEADS + kv_head)
        for tile in tl.range(start // TILE * TILE, end, TILE):
            token = tile + tl.arange(0, TILE)
            seen = token[None, :] < tl.minimum(limit, end)[:, None]
            if WINDOWED:
                seen = seen & (token[None, :] >= limit[:, None] - window)
            if TMA:
                block = tl.load(table_ptr + row * table_stride + tile // BLOCK_TOKENS)
                slot = block * block_rows + first_row + tile % BLOCK_TOKENS
                keys = pool_desc.load([slot, 0])
                values = pool_desc.load([slot + BLOCK_TOKENS, 0])
                if SCALES == TOKEN_SCALES:
                    scales = (block.to(tl.int64) * block_rows + first_row) * (DIM // 4) + tile % BLOCK_TOKENS
                    place = scale_ptr + scales + tl.arange(0, TILE)
                    key_scales = tl.load(place)
                    value_scales = tl.load(place + BLOCK_TOKENS)
            else:
                there = token < end
                if WINDOWED:
                    there = there & (token >= first)
                blocks = tl.load(table_ptr + row * table_stride + token // BLOCK_TOKENS, mask=there, other=0).to(
                    tl.int64
                )
                slots = blocks * block_rows + first_row + token % BLOCK_TOKENS
                place = pool_ptr + slots[:, None] * DIM + element[None, :]
                read = there[:, None] & (element < DIM)[None, :]
                keys = tl.load(place, mask=read, other=0.0)
                values = tl.load(place + BLOCK_TOKENS * DIM, mask=read, other=0.0)
                if SCALES == TOKEN_SCALES:
                    scales = (blocks * block_rows + first_row) * (DIM // 4) + token % BLOCK_TOKENS
                    key_scales = tl.load(scale_ptr + scales, mask=there, other=0.0)
                    value_scales = tl.load(scale_ptr + scales + BLOCK_TOKENS, mask=there, other=0.0)
            scores = tl.dot(query, keys.to(query.dtype).T, input_precision="ieee") * scale_log2
            if SCALES == TOKEN_SCALES:
                scores *= key_scales[None, :]
            if SOFTCAP > 0.0:
                scores = bounded(scores, SOFTCAP)
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            bound = tl.where(new_top > float("-inf"), new_top, 0.0)  # a query may see none of a tile that others do
            weights = tl.exp2(scores - bound[:, None])
            shrink = tl.exp2(top - bound)
            total = total * shrink + tl.sum(weights, 1)
            if SCALES == TOKEN_SCALES:
                weights *= value_scales[None, :]
            values = values.to(query.dtype)
            sums = tl.dot(weights.to(query.dtype), values, sums * shrink[:, None], input_precision="ieee")
            top = new_top
        if SCALES == STATIC_SCALES:
            sums *= tl.load(scale_ptr + (layer * 2 + 1) * KV_HEADS + kv_head)
        num_chunks = tl.load(chunk + PARTS)
        if num_chunks - first_chunk > 1:
            first_part = kv_head * num_parts + tl.load(chunk + FIRST)
            part = first_part + number_of_query * num_chunks + own_chunk
            place = parts_ptr + (part * GROUP + each % GROUP)[:, None] * DIM + element[None, :]
            tl.store(place, sums, mask=inside)
            place = softmax_ptr + part * 2 * GROUP + each % GROUP
            tl.store(place, top, mask=computes)
            tl.store(place + GROUP, total, mask=computes)
            merge_by_the_last(
                arrived_ptr + row * KV_HEADS + kv_head, parts_ptr, softmax_ptr, out_ptr + kv_head * GROUP * DIM,
                first_part, first_chunk, num_chunks, queries, row, following, HEADS * DIM, DIM, DIM_BLOCK, GROUP,
                GROUP_BLOCK, AT_ONCE, sink_ptr + kv_head * GROUP, SINKS,
            )  # fmt: skip
        else:
            if SINKS:
                total += sink_weights(sink_ptr + kv_head * GROUP, each % GROUP, computes, top)
            result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + heads_at[:, None] + element[None, :], result, mask=inside)


def decode_attention(
    query: torch.Tensor,
    pool: PagedPool,
    layer: int,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    plan: DecodePlan,
    scratch: DecodeScratch,
    out: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    pdl: bool = False,
) -> Callable[[int, torch.Tensor | None], None]:
    """Fills out [B, H, D]; query [B, H, D], pool with KH units, of the query's dtype or of 8-bit floats with scales.

    block_tables int32 [B, blocks of the longest]; lengths int32 [B], the new token included, whose key and value are in
    the pool. scratch.work is what decode_work.share_out made of the lengths and the plan; tables of rows that share_out
    was given as following others are not read. A row of length 0 is padding: its output is not written. window: how
    many tokens are seen at most, the own one included. scale: D**-0.5 unless given; softcap: the limit of scores,
    softcap.bounded. sinks: float32 [H]. With `pdl` no kernel of the same chain may write lengths or the work.
    Returns what does the same for another layer and its sinks, in a fraction of the host's time.
    """
    num_rows, num_heads, head_dim = query.shape
    kv_heads, block_tokens = pool.num_units, pool.block_tokens
    require(query.shape == out.shape and pool.head_dim == head_dim, "query, out and pool differ in shape")
    require(num_heads % kv_heads == 0 and num_heads // kv_heads <= GROUP_ROWS, f"{num_heads} on {kv_heads} heads")
    require(head_dim % 16 == 0 and head_dim <= 256, f"head_dim {head_dim} is not a multiple of 16 up to 256")
    require(block_tokens & (block_tokens - 1) == 0, f"block_tokens {block_tokens} is no power of two")
    require(query.dtype == out.dtype, "query and out differ in dtype")
    pool.require_reads(query)
    require(block_tables.shape[0] == num_rows and lengths.shape == (num_rows,), "tables and lengths need a row each")
    require(block_tables.dtype == lengths.dtype == torch.int32, "tables and lengths must be int32")
    require(block_tables.stride(1) == 1, "rows of block_tables must be contiguous")
    whole = sinks is None or (tuple(sinks.shape) == (num_heads,) and sinks.dtype == torch.float32)
    require(whole, "sinks must be float32 [H]")
    for tensor in (query, lengths, out, sinks):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    require(plan.queries <= queries_of(num_heads // kv_heads), f"{plan.queries} queries do not fit a program")
    parts = plan.num_parts * num_heads
    enough = scratch.parts.numel() >= parts * head_dim and scratch.softmax.numel() >= parts * 2
    enough = enough and len(scratch.work) >= plan.num_chunks and scratch.arrived.numel() >= num_rows * kv_heads
    require(enough, "the scratch is too small for the plan")
    if num_rows == 0:
        return launch_nothing
    group_block = next_power_of_2(num_heads // kv_heads)
    dim_block = next_power_of_2(head_dim)
    tma = block_tokens >= TILE and dim_block == head_dim
    planned_bytes = HEAD_BYTES if pool.scales is None else FP8_HEAD_BYTES
    head_bytes = max(planned_bytes, dim_block * pool.tensor.element_size())
    tiles = max(1, plan.num_stages // 2 * planned_bytes // head_bytes)
    common = (
        block_tables,
        lengths,
        scratch.work,
        out,
        scratch.parts,
        scratch.softmax,
        scratch.arrived,
        scratch.softmax if sinks is None else sinks,
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        layer,
        pool.unit_rows,
        block_tables.stride(0),
        0 if window is None else window,
        plan.num_parts,
    )
    shape = dict(
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        LAYER_ROWS=pool.layer_rows,
        SCALES=pool.scale_mode,
        TILE=TILE,
        ROWS=GROUP_ROWS,
        GROUP_BLOCK=group_block,
        AT_ONCE=plan.merged or merged_parts(group_block * dim_block),
        SINKS=sinks is not None,
        WINDOWED=window is not None,
        PDL=pdl,
        **launch_options(4, pdl, 1 + 2 * tiles),
    )
    grid = (kv_heads * plan.num_chunks,)
    if tma and pool.scales is not None and query.dtype != torch.float32 and head_dim >= FP8_DIM and softcap is None:
        words = TensorDescriptor.from_tensor(pool.rows.view(torch.int32), [TILE, head_dim // 4])
        launch = Launch(
            decode_fp8_attention_kernel, grid, query, words, pool.scales, *common, ASM=not INTERPRETED, **shape
        )
    else:
        boxes = TensorDescriptor.from_tensor(pool.rows, [TILE, head_dim]) if tma else None
        launch = Launch(
            _decode_attention_kernel,
            grid,
            query,
            boxes,
            pool.tensor,
            pool.scales,
            *common,
            SOFTCAP=limit_log2(softcap),
            DIM_BLOCK=dim_block,
            TMA=tma,
            **shape,
        )

    def of_layer(layer: int, sinks: torch.Tensor | None) -> None:
        pool.require_layer(layer)
        launch(layer=layer, sink_ptr=scratch.softmax if sinks is None else sinks)

    of_layer(layer, sinks)
    return of_layer
