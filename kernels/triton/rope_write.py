"""Norm and rotation of queries and keys, and keys and values into the paged pool: all between two linears, one kernel.

    q, k = x / sqrt(mean(x**2) + eps) * weight              each head by itself; models without these norms skip it
    (a, b) -> (a * cos - b * sin, b * cos + a * sin)        a, b: first and second half of what is rotated of q and k
    query[n] = q;  pool[block, :, layer, 0, offset] = k;  pool[block, :, layer, 1, offset] = v
    of 8-bit floats:  scale = max |x| / 448, or the checkpoint's;  what is stored is x / scale

block and offset are slot // block_tokens and slot % block_tokens; a negative slot is a row of padding, which writes no
key or value. qkv is [N, (H + 2 KH) * D], or [S, N, ...] partial sums of the product before, added in order. In float32
between load and store. A program does a few heads of one token, so a row's bits do not depend on the other rows.
Bytes: S * size(qkv) + size(query) + the keys and values, about 4 * N * (H + 2 KH) * D in bfloat16.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import launch_options, next_power_of_2, require
from baton.kernels.triton.pool import (
    FP8_MAX,
    NO_SCALES,
    SMALLEST_AMAX,
    TOKEN_SCALES,
    PagedPool,
    quantise,
)


@dataclass(frozen=True, slots=True)
class RopeTables:
    """The rotations of all positions, [max_positions, R / 2] each, with the attention factor multiplied in.

    Of a head the first R elements are rotated.
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of query and key heads: a weight for each head, [H + KH, D]."""

    weight: torch.Tensor
    eps: float


@triton.jit(do_not_specialize=["num_tokens", "layer", "unit_rows", "eps"])
def _rope_write_kernel(
    qkv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    pool_ptr,
    scale_ptr,
    query_ptr,
    num_tokens,
    layer,
    unit_rows,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    PARTIALS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS_AT_ONCE
    HALF: tl.constexpr = DIM // 2
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    element = tl.arange(0, HALF_BLOCK)
    inside = (element < HALF)[None, :]
    # Pairs of a head's elements: those that are rotated together, then the others, halves of theirs apart.
    turns = element < ROTARY // 2
    low_place = (element if ROTARY == DIM else tl.where(turns, element, element + ROTARY // 2))[None, :]
    high_place = (element + HALF if ROTARY == DIM else tl.where(turns, element + ROTARY // 2, element + HALF))[None, :]
    head = first_head + tl.arange(0, HEADS_AT_ONCE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = qkv_ptr + token * WIDTH + head[:, None] * DIM
    low = tl.load(base + low_place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(base + high_place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTIALS):
        shift = part * num_tokens.to(tl.int64) * WIDTH
        low += tl.load(base + shift + low_place, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(base + shift + high_place, mask=inside, other=0.0).to(tl.float32)
    if first_head < HEADS + KV_HEADS:
        if NORM:
            scale = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)
            weights = weight_ptr + head[:, None] * DIM
            low = low * scale[:, None] * tl.load(weights + low_place, mask=inside, other=0.0).to(tl.float32)
            high = high * scale[:, None] * tl.load(weights + high_place, mask=inside, other=0.0).to(tl.float32)
        place = tl.load(position_ptr + token).to(tl.int64) * (ROTARY // 2) + element
        cos = tl.load(cos_ptr + place, mask=turns, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + place, mask=turns, other=0.0).to(tl.float32)[None, :]
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned
    if first_head < HEADS:
        query = query_ptr + token * HEADS * DIM + head[:, None] * DIM
        tl.store(query + low_place, low.to(query_ptr.dtype.element_ty), mask=inside)
        tl.store(query + high_place, high.to(query_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_ptr + token).to(tl.int64)
        which = (first_head - HEADS) // KV_HEADS  # 0: key, 1: value
        kv_head = head - HEADS - which * KV_HEADS
        first_row = (slot // BLOCK_TOKENS * KV_HEADS + kv_head) * unit_rows + layer * LAYER_ROWS
        offset = which * BLOCK_TOKENS + slot % BLOCK_TOKENS
        if SCALES != NO_SCALES:
            if SCALES == TOKEN_SCALES:
                largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
                unit = tl.div_rn(tl.maximum(largest, SMALLEST_AMAX), FP8_MAX)
                tl.store(scale_ptr + first_row * (DIM // 4) + offset, unit, mask=slot >= 0)
            else:
                unit = tl.load(scale_ptr + (layer * 2 + which) * KV_HEADS + kv_head)
            low = quantise(low, unit[:, None])
            high = quantise(high, unit[:, None])
        target = pool_ptr + (first_row + offset)[:, None] * DIM
        tl.store(target + low_place, low.to(pool_ptr.dtype.element_ty), mask=inside & (slot >= 0))
        tl.store(target + high_place, high.to(pool_ptr.dtype.element_ty), mask=inside & (slot >= 0))


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rope: RopeTables,
    norms: HeadNorms | None,
    pool: PagedPool,
    layer: int,
    query: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Fills query [N, H, D] and the slots [N] of one layer of the pool, which has KH units.

    positions and slots: int32 or int64 [N]; a position must lie below the length of the tables. query and pool have one
    dtype, unless the pool's numbers have scales. Everything is contiguous.
    """
    num_tokens, num_heads, head_dim = query.shape
    kv_heads = pool.num_units
    pool.require_layer(layer)
    require(pool.head_dim == head_dim and head_dim % 2 == 0, f"head_dim of pool {pool.head_dim} and query {head_dim}")
    width = (num_heads + 2 * kv_heads) * head_dim
    require(tuple(qkv.shape[-2:]) == (num_tokens, width), f"qkv {tuple(qkv.shape)} is not [{num_tokens}, {width}]")
    rotary_dim = 2 * rope.cos.shape[1]
    require(rope.cos.shape == rope.sin.shape and 0 < rotary_dim <= head_dim, "tables are not [., at most head_dim / 2]")
    require(positions.shape == slots.shape == (num_tokens,), "positions and slots must be [num_tokens]")
    pool.require_reads(query)
    norm_shape = (num_heads + kv_heads, head_dim)
    require(norms is None or norms.weight.shape == norm_shape, f"norms must be {list(norm_shape)}")
    for tensor in (qkv, rope.cos, rope.sin, positions, slots, query, None if norms is None else norms.weight):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_tokens == 0:
        return
    at_once = next(count for count in (4, 2, 1) if num_heads % count == 0 and kv_heads % count == 0)
    _rope_write_kernel[(num_tokens, (num_heads + 2 * kv_heads) // at_once)](
        qkv,
        qkv if norms is None else norms.weight,
        rope.cos,
        rope.sin,
        positions,
        slots,
        pool.tensor,
        pool.scales,
        query,
        num_tokens,
        layer,
        pool.unit_rows,
        0.0 if norms is None else norms.eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=head_dim,
        ROTARY=rotary_dim,
        HALF_BLOCK=next_power_of_2(head_dim // 2),
        BLOCK_TOKENS=pool.block_tokens,
        LAYER_ROWS=pool.layer_rows,
        SCALES=pool.scale_mode,
        HEADS_AT_ONCE=at_once,
        PARTIALS=qkv.shape[0] if qkv.dim() == 3 else 1,
        NORM=norms is not None,
        PDL=pdl,
        **launch_options(at_once, pdl),
    )
