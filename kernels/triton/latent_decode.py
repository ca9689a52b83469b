"""Latent attention of one new token a sequence over the latents of its tokens in the paged pool, cut into chunks.

    scores[t] = scale * query[b, h] . row[t];   out[b, h] = sum_t softmax_t(scores) row[t, :L],   t < length[b]

A row of the pool is a token's latent (L elements) and its rotated key (R), which all heads share; the queries were
multiplied by each head's part of the weight that makes keys (latent_products.absorb), so one tile of rows serves both
products of all heads. They are computed transposed: tokens, and then elements of the latent, are the long side of the
matrix instructions, which read the tile where it arrived, and heads the short one. A program does one chunk of one
sequence (decode_work) and a tile of heads, and always leaves its part: latent_products.raise_merged merges them.

Bytes: the rows, sum(length) * (L + R) * element size, for each tile of heads. Blocks of 64 tokens and more arrive by
TMA. The pool must be finite everywhere: what lies past a sequence's end is multiplied by 0, not skipped.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import TILE, DecodePlan
from baton.kernels.triton.decode_work import COLUMNS, END, ROW, START
from baton.kernels.triton.launch import Launch, launch_nothing, launch_options, require
from baton.kernels.triton.pool import PagedPool


@triton.jit(do_not_specialize=["layer", "unit_rows", "scale_log2"])
def _latent_decode_kernel(
    query_ptr,
    latent_desc,
    key_desc,
    pool_ptr,
    table_ptr,
    work_ptr,
    parts_ptr,
    softmax_ptr,
    scale_log2,
    layer,
    unit_rows,
    table_stride,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    LATE_SUM: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = (HEADS + HEAD_TILE - 1) // HEAD_TILE
    DIM: tl.constexpr = LATENT + ROTATED
    number = tl.program_id(0) // TILES
    head = tl.program_id(0) % TILES * HEAD_TILE + tl.arange(0, HEAD_TILE)
    chunk = work_ptr + number * COLUMNS  # not written by the kernels of a layer: before the wait
    row = tl.load(chunk + ROW)
    start = tl.load(chunk + START)
    end = tl.load(chunk + END)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if start < end:
        there = (head < HEADS)[:, None]
        element = tl.arange(0, LATENT)[None, :]
        rest = LATENT + tl.arange(0, ROTATED)[None, :]
        place = query_ptr + (row * HEADS + head).to(tl.int64)[:, None] * DIM
        of_latent = tl.load(place + element, mask=there, other=0.0).T  # [LATENT, HEAD_TILE]
        of_key = tl.load(place + rest, mask=there, other=0.0).T
        top = tl.full([HEAD_TILE], float("-inf"), tl.float32)
        totals = tl.zeros([TILE if LATE_SUM else 1, HEAD_TILE], tl.float32)
        sums = tl.zeros([LATENT, HEAD_TILE], tl.float32)
        first_row = layer * LAYER_ROWS
        for tile in tl.range(start, end, TILE):
            token = tile + tl.arange(0, TILE)
            seen = (token < end)[:, None]
            if TMA:
                block = tl.load(table_ptr + row * table_stride + tile // BLOCK_TOKENS)
                slot = block * unit_rows + first_row + tile % BLOCK_TOKENS
                latents = latent_desc.load([slot, 0])
                keys = key_desc.load([slot, LATENT])
            else:
                blocks = tl.load(table_ptr + row * table_stride + token // BLOCK_TOKENS, mask=token < end, other=0)
                slots = blocks.to(tl.int64) * unit_rows + first_row + token % BLOCK_TOKENS
                latents = tl.load(pool_ptr + slots[:, None] * DIM + element, mask=seen, other=0.0)
                keys = tl.load(pool_ptr + slots[:, None] * DIM + rest, mask=seen, other=0.0)
            scores = tl.dot(latents, of_latent, input_precision="ieee")
            scores = tl.dot(keys, of_key, scores, input_precision="ieee") * scale_log2
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            weights = tl.exp2(scores - new_top[None, :])
            shrink = tl.exp2(top - new_top)[None, :]
            totals = totals * shrink + (weights if LATE_SUM else tl.sum(weights, 0)[None, :])
            sums = tl.dot(latents.T, weights.to(latents.dtype), sums * shrink, input_precision="ieee")
            top = new_top
        place = parts_ptr + number.to(tl.int64) * HEADS * LATENT + tl.arange(0, LATENT)[:, None]
        tl.store(place + head[None, :] * LATENT, sums, mask=(head < HEADS)[None, :])
        place = softmax_ptr + number * 2 * HEADS + head
        tl.store(place, top, mask=head < HEADS)
        tl.store(place + HEADS, tl.sum(totals, 0), mask=head < HEADS)


def head_tile(heads: int) -> int:
    """Heads of a program: of few, the fewest that a matrix instruction takes; of many, so that few programs read the
    same rows."""
    return 16 if heads <= 16 else 32 if heads <= 32 else 64


def head_tiles(heads: int) -> int:
    """Programs a chunk, as a plan counts them."""
    return -(-heads // head_tile(heads))


def latent_decode_attention(
    query: torch.Tensor,
    pool: PagedPool,
    layer: int,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    scratch: DecodeScratch,
    *,
    scale: float,
    pdl: bool = False,
) -> Callable[[int], None]:
    """Leaves the parts of all chunks in the scratch, which was made for L elements of one key head.

    query [B, H, L + R], absorbed; block_tables int32 [B, blocks of the longest]. scratch.work is what
    decode_work.share_out made of lengths and the plan. With `pdl` no kernel of the same chain may write the work.
    Returns what does the same for another layer, in a fraction of the host's time.
    """
    num_rows, heads, dim = query.shape
    block_tokens, latent = pool.block_tokens, 1 << (dim.bit_length() - 1)
    rotated = dim - latent
    require(pool.tensor.shape[3] == 1 and pool.num_units == 1, "the pool is not of one unit of one plane")
    require(pool.head_dim == dim, f"rows of the pool have {pool.head_dim} elements, queries {dim}")
    require(rotated >= 16 and rotated & (rotated - 1) == 0, f"{dim} elements are no two powers of two")
    require(block_tokens & (block_tokens - 1) == 0, f"block_tokens {block_tokens} is no power of two")
    pool.require_reads(query)
    require(block_tables.shape[0] == num_rows and block_tables.dtype == torch.int32, "tables need a row each, int32")
    require(block_tables.stride(1) == 1, "rows of block_tables must be contiguous")
    require(query.is_contiguous(), "tensors must be contiguous")
    parts = plan.num_chunks * heads
    enough = scratch.parts.numel() >= parts * latent and scratch.softmax.numel() >= parts * 2
    require(enough and len(scratch.work) >= plan.num_chunks, "the scratch is too small for the plan")
    if num_rows == 0:
        return launch_nothing
    tma = block_tokens >= TILE
    launch = Launch(
        _latent_decode_kernel,
        (plan.num_chunks * head_tiles(heads),),
        query,
        TensorDescriptor.from_tensor(pool.rows, [TILE, latent]) if tma else None,
        TensorDescriptor.from_tensor(pool.rows, [TILE, rotated]) if tma else None,
        pool.tensor,
        block_tables,
        scratch.work,
        scratch.parts,
        scratch.softmax,
        scale * math.log2(math.e),
        layer,
        pool.unit_rows,
        block_tables.stride(0),
        HEADS=heads,
        LATENT=latent,
        ROTATED=rotated,
        BLOCK_TOKENS=block_tokens,
        LAYER_ROWS=pool.layer_rows,
        TILE=TILE,
        HEAD_TILE=head_tile(heads),
        LATE_SUM=heads <= 16,  # of many heads, registers are fewer than time
        TMA=tma,
        PDL=pdl,
        **(launch_options(4, pdl, 3) if heads <= 16 else launch_options(8, pdl, 2)),  # two tiles in flight either way
    )

    def of_layer(layer: int) -> None:
        pool.require_layer(layer)
        launch(layer=layer)

    of_layer(layer)
    return of_layer
