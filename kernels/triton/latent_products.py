"""The two products of decoding with latent attention that have a weight for each head, with what surrounds them.

    absorb:  out[n, h] = query[n, h, :P] key_up[h] | query[n, h, P:]
    raise:   out[n, h] = value_up[h] merged[n, h],   merged = the parts that attention left, by their softmax

key_up [P, L] and value_up [V, L] are the rows of a head of the weight that makes keys and values of a latent, so that
attention itself reads latents only (DeepSeek-AI, DeepSeek-V2, 2024). The parts of a row are merged in the order of its
chunks, so a row's bits do not depend on the others. Bytes: the weights, H * (P + V) * L, once for each 16 rows.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.decode_work import COLUMNS, END, FIRST, PARTS, ROW, START
from baton.kernels.triton.launch import Launch, cdiv, launch_nothing, launch_options, next_power_of_2, require

TILE_ROWS = 16  # of a product; in larger ones the bits of a row might be others
COLUMNS_A_TILE = 64
FEW_ROWS = 16  # up to so many, with many parts each, are merged by a program each
VALUES_A_TILE = 32


@triton.jit(do_not_specialize=["num_rows"])
def _absorb_kernel(
    query_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    LATENT: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    first = tl.program_id(1) * TILE
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None]
    element = tl.arange(0, PLAIN_BLOCK)
    column = first + tl.arange(0, TILE)
    weight_at = weight_ptr + (head * HEAD_ROWS + element[:, None]) * LATENT + column[None, :]
    weight = tl.load(weight_at, mask=(element < PLAIN)[:, None] & (column < LATENT)[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = query_ptr + (row * HEADS + head).to(tl.int64)[:, None] * (PLAIN + ROTATED)
    query = tl.load(place + element[None, :], mask=inside & (element < PLAIN)[None, :], other=0.0)
    out = out_ptr + (row * HEADS + head).to(tl.int64)[:, None] * (LATENT + ROTATED)
    result = tl.dot(query, weight, input_precision="ieee")
    tl.store(out + column[None, :], result.to(out_ptr.dtype.element_ty), mask=inside & (column < LATENT)[None, :])
    if first == 0:
        rest = tl.arange(0, ROTATED)[None, :]
        rotated = tl.load(place + PLAIN + rest, mask=inside, other=0.0)
        tl.store(out + LATENT + rest, rotated, mask=inside)


@triton.jit
def parts_of(work_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """First part, and how many there are, of each row; found among the chunks of the step."""
    first = tl.zeros_like(row)
    count = tl.zeros_like(row)
    for start in tl.range(0, num_chunks, CHUNKS):
        number = start + tl.arange(0, CHUNKS)
        chunk = work_ptr + number * COLUMNS
        there = number < num_chunks
        used = tl.load(chunk + START, mask=there, other=0) < tl.load(chunk + END, mask=there, other=0)
        mine = (tl.load(chunk + ROW, mask=there, other=0)[None, :] == row[:, None]) & used[None, :]
        first = tl.maximum(first, tl.max(tl.where(mine, tl.load(chunk + FIRST, mask=there, other=0)[None, :], 0), 1))
        count = tl.maximum(count, tl.max(tl.where(mine, tl.load(chunk + PARTS, mask=there, other=0)[None, :], 0), 1))
    return first, count


@triton.jit
def merged_latents(
    parts_ptr, softmax_ptr, head, first, count, HEADS: tl.constexpr, LATENT: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What a head attended to, float32 [ROWS, LATENT]; first and count: parts of each row."""
    element, most = tl.arange(0, LATENT), tl.max(count, 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(0, most, CHUNKS):
        part = start + tl.arange(0, CHUNKS)[None, :]
        place = softmax_ptr + (first[:, None] + part) * 2 * HEADS + head
        tops = tl.load(place, mask=part < count[:, None], other=float("-inf"))
        top = tl.maximum(top, tl.max(tops, 1))
    top = tl.where(count > 0, top, 0.0)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, LATENT], tl.float32)
    for start in tl.range(0, most, AT_ONCE):
        for step in tl.static_range(AT_ONCE):  # their loads are in flight together
            there = start + step < count
            number = first + start + step
            place = softmax_ptr + number * 2 * HEADS + head
            share = tl.exp2(tl.load(place, mask=there, other=float("-inf")) - top)
            total += share * tl.load(place + HEADS, mask=there, other=0.0)
            place = parts_ptr + (number * HEADS + head).to(tl.int64)[:, None] * LATENT + element[None, :]
            merged += share[:, None] * tl.load(place, mask=there[:, None], other=0.0)
    return merged / tl.where(count > 0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def _raise_kernel(
    parts_ptr,
    softmax_ptr,
    work_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    num_chunks,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    value = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    element = tl.arange(0, LATENT)
    weight_at = weight_ptr + (head * (PLAIN + VALUE) + PLAIN + value[:, None]) * LATENT + element[None, :]
    weight = tl.load(weight_at, mask=(value < VALUE)[:, None], other=0.0)  # [TILE, LATENT]
    first, count = parts_of(work_ptr, row, num_chunks, CHUNKS)  # not written by the kernels of a layer
    count = tl.where(row < num_rows, count, 0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    merged = merged_latents(parts_ptr, softmax_ptr, head, first, count, HEADS, LATENT, CHUNKS, ROWS, AT_ONCE)
    merged = merged.to(weight_ptr.dtype.element_ty)
    if ROWS == 1:  # the same product as that of a tile, which keeps the bits
        result = tl.dot(tl.broadcast_to(merged, [TILE_ROWS, LATENT]), weight.T, input_precision="ieee")
        result = tl.max(result, 0)[None, :]
    else:
        result = tl.dot(merged, weight.T, input_precision="ieee")
    out = out_ptr + (row * HEADS + head).to(tl.int64)[:, None] * VALUE + value[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=(count > 0)[:, None] & (value < VALUE)[None, :])


def absorb(
    query: torch.Tensor, kv_up: torch.Tensor, out: torch.Tensor, *, pdl: bool = False
) -> Callable[[torch.Tensor], None]:
    """Fills out [N, H, L + R]; query [N, H, P + R], kv_up [H, P + V, L], the rows of key_up first. Returns what does
    the same with another layer's kv_up, in a fraction of the host's time."""
    num_rows, heads, dim = query.shape
    latent = kv_up.shape[2]
    rotated = out.shape[2] - latent
    plain = dim - rotated
    require(out.shape[:2] == query.shape[:2] and len(kv_up) == heads, "query, kv_up and out differ in heads")
    require(0 < plain < kv_up.shape[1] and rotated > 0, f"{dim} elements with {rotated} rotated do not fit kv_up")
    require(rotated & (rotated - 1) == 0, f"{rotated} elements are rotated, no power of two")
    require(query.dtype == kv_up.dtype == out.dtype, "query, kv_up and out differ in dtype")
    for tensor in (query, kv_up, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return launch_nothing
    launch = Launch(
        _absorb_kernel,
        (heads, cdiv(latent, COLUMNS_A_TILE), cdiv(num_rows, TILE_ROWS)),
        query,
        kv_up,
        out,
        num_rows,
        HEADS=heads,
        PLAIN=plain,
        PLAIN_BLOCK=max(16, next_power_of_2(plain)),
        ROTATED=rotated,
        LATENT=latent,
        HEAD_ROWS=kv_up.shape[1],
        ROWS=TILE_ROWS,
        TILE=COLUMNS_A_TILE,
        PDL=pdl,
        **launch_options(4, pdl),
    )

    def with_weight(kv_up: torch.Tensor) -> None:
        launch(weight_ptr=kv_up)

    with_weight(kv_up)
    return with_weight


def raise_merged(
    scratch: DecodeScratch, plan: DecodePlan, kv_up: torch.Tensor, out: torch.Tensor, *, pdl: bool = False
) -> Callable[[torch.Tensor], None]:
    """Fills out [N, H, V] from what latent_decode_attention left in the scratch; kv_up [H, P + V, L].

    A row without tokens is padding: its output is not written. Returns the same as absorb.
    """
    num_rows, heads, value = out.shape
    latent = kv_up.shape[2]
    require(len(kv_up) == heads and 0 < value < kv_up.shape[1], "kv_up and out differ in heads or elements")
    require(latent & (latent - 1) == 0, f"a latent of {latent} elements is no power of two")
    require(scratch.parts.numel() >= plan.num_chunks * heads * latent, "the scratch is too small for the plan")
    require(kv_up.is_contiguous() and out.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return launch_nothing
    few = num_rows <= FEW_ROWS
    rows = 1 if few else TILE_ROWS
    launch = Launch(
        _raise_kernel,
        (heads, cdiv(value, VALUES_A_TILE), cdiv(num_rows, rows)),
        scratch.parts,
        scratch.softmax,
        scratch.work,
        kv_up,
        out,
        num_rows,
        plan.num_chunks,
        HEADS=heads,
        PLAIN=kv_up.shape[1] - value,
        VALUE=value,
        LATENT=latent,
        CHUNKS=256 if few else 128,
        ROWS=rows,
        TILE_ROWS=TILE_ROWS,
        TILE=VALUES_A_TILE,
        AT_ONCE=16 if few else 2,
        PDL=pdl,
        **launch_options(4 if few else 8, pdl),
    )

    def with_weight(kv_up: torch.Tensor) -> None:
        launch(weight_ptr=kv_up)

    with_weight(kv_up)
    return with_weight
