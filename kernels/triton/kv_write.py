"""Keys and values of a step into the paged pool as they are: what a model brings that has rotated them itself.

    pool[block, :, layer, 0, offset] = k;  pool[block, :, layer, 1, offset] = v;  zeros behind heads that are narrower
    of 8-bit floats:  scale = max |x| / 448, or the checkpoint's;  what is stored is x / scale

block and offset are slot // block_tokens and slot % block_tokens; a negative slot is a row of padding, which writes
nothing. A program does a few heads of one token. Bytes: keys and values, read and written.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import launch_options, next_power_of_2, require
from baton.kernels.triton.pool import FP8_MAX, NO_SCALES, SMALLEST_AMAX, TOKEN_SCALES, PagedPool, quantise


@triton.jit(do_not_specialize=["layer", "unit_rows"])
def _kv_write_kernel(
    key_ptr,
    value_ptr,
    slot_ptr,
    pool_ptr,
    scale_ptr,
    layer,
    unit_rows,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) % 2  # 0: key, 1: value
    head = tl.program_id(1) // 2 * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    element = tl.arange(0, DIM_BLOCK)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if which == 0:
        place = key_ptr + token * key_stride + head[:, None] * key_head_stride + element[None, :]
        x = tl.load(place, mask=(element < KEY_DIM)[None, :], other=0.0).to(tl.float32)
    else:
        place = value_ptr + token * value_stride + head[:, None] * value_head_stride + element[None, :]
        x = tl.load(place, mask=(element < VALUE_DIM)[None, :], other=0.0).to(tl.float32)
    first_row = (slot // BLOCK_TOKENS * KV_HEADS + head) * unit_rows + layer * LAYER_ROWS
    offset = which * BLOCK_TOKENS + slot % BLOCK_TOKENS
    if SCALES != NO_SCALES:
        if SCALES == TOKEN_SCALES:
            unit = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), SMALLEST_AMAX), FP8_MAX)
            tl.store(scale_ptr + first_row * (DIM // 4) + offset, unit, mask=slot >= 0)
        else:
            unit = tl.load(scale_ptr + (layer * 2 + which) * KV_HEADS + head)
        x = quantise(x, unit[:, None])
    target = pool_ptr + (first_row + offset)[:, None] * DIM + element[None, :]
    tl.store(target, x.to(pool_ptr.dtype.element_ty), mask=(element < DIM)[None, :] & (slot >= 0))


def kv_write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, pool: PagedPool, layer: int) -> None:
    """Fills the slots [N] of one layer of the pool, which has KH units of D: key [N, KH, Dk], value [N, KH, Dv], whose
    heads are contiguous and at most D wide. slots: int32 or int64, contiguous."""
    num_tokens, kv_heads, key_dim = key.shape
    pool.require_layer(layer)
    require(kv_heads == pool.num_units and value.shape[:2] == key.shape[:2], "keys, values and pool differ in heads")
    require(max(key_dim, value.shape[2]) <= pool.head_dim, f"heads of {key_dim} in a pool of {pool.head_dim}")
    require(key.stride(2) == value.stride(2) == 1, "heads must be contiguous")
    require(slots.shape == (num_tokens,) and slots.is_contiguous(), "slots must be [num_tokens], contiguous")
    pool.require_reads(key)
    if num_tokens == 0:
        return
    at_once = next(count for count in (4, 2, 1) if kv_heads % count == 0)
    _kv_write_kernel[(num_tokens, 2 * kv_heads // at_once)](
        key,
        value,
        slots,
        pool.tensor,
        pool.scales,
        layer,
        pool.unit_rows,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KV_HEADS=kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value.shape[2],
        DIM=pool.head_dim,
        DIM_BLOCK=next_power_of_2(pool.head_dim),
        BLOCK_TOKENS=pool.block_tokens,
        LAYER_ROWS=pool.layer_rows,
        SCALES=pool.scale_mode,
        HEADS_AT_ONCE=at_once,
        **launch_options(at_once, False),
    )
