"""Between the products of latent attention: norms of latents, rotations, and the row of each token into the pool.

    latent = x / sqrt(mean(x**2) + eps) * weight            of keys and values, and of queries where they have one
    (a, b) -> (a * cos - b * sin, b * cos + a * sin)        pairs of the part of a query or of the key that is rotated
    pool[block, 0, layer, 0, offset] = latent | rotated key;  query[n] = parts without position | rotated parts

Pairs are neighbours in the weights of most models (`interleaved`), else a half apart. What is written has the pairs a
half apart always, first elements first: products of queries and keys are the same in any order. The input is
[N, Q + L + R], or [S, N, ...] partial sums of the product before, added in order; Q is the width of the queries, or of
their latent. In float32 between load and store; a program does a few heads, or a latent, of one token, so a row's bits
do not depend on the others. Bytes: the input read, about as much written.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import launch_options, next_power_of_2, require
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.rope_write import RopeTables


@triton.jit
def _summed(place, stride, inside, PARTIALS: tl.constexpr):
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTIALS):
        total += tl.load(place + part * stride, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _normed(place, stride, weight_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = _summed(place + column, stride, inside, PARTIALS)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    return x * scale * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rotate(
    place, stride, rotation, cos_ptr, sin_ptr, out, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """place and out: pointers to the begin of what is rotated, a column; rotation: the number of a pair."""
    low_at = 2 * rotation if INTERLEAVED else rotation
    high_at = low_at + 1 if INTERLEAVED else rotation + HALF
    low = _summed(place + low_at, stride, inside, PARTIALS)
    high = _summed(place + high_at, stride, inside, PARTIALS)
    cos = tl.load(cos_ptr + rotation).to(tl.float32)
    sin = tl.load(sin_ptr + rotation).to(tl.float32)
    tl.store(out + rotation, (low * cos - high * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(out + rotation + HALF, (high * cos + low * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_heads(
    row, stride, query, first_head, cos_ptr, sin_ptr, PLAIN: tl.constexpr, PLAIN_BLOCK: tl.constexpr,
    ROTATED: tl.constexpr, AT_ONCE: tl.constexpr, INTERLEAVED: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """row, query: where the queries of a token begin, and where they go."""
    head = (first_head + tl.arange(0, AT_ONCE))[:, None] * (PLAIN + ROTATED)
    column = tl.arange(0, PLAIN_BLOCK)[None, :]
    inside = column < PLAIN
    plain = _summed(row + head + column, stride, inside, PARTIALS)
    tl.store(query + head + column, plain.to(query.dtype.element_ty), mask=inside)
    rotation = tl.arange(0, ROTATED // 2)[None, :]
    place = row + head + PLAIN
    _rotate(
        place, stride, rotation, cos_ptr, sin_ptr, query + head + PLAIN, rotation >= 0, ROTATED // 2, INTERLEAVED,
        PARTIALS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "layer", "unit_rows", "eps"])
def _latent_write_kernel(
    x_ptr,
    weight_ptr,
    query_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    pool_ptr,
    query_ptr,
    num_tokens,
    layer,
    unit_rows,
    eps,
    QUERY: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr,
    LATENT: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    QUERY_LATENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIALS: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = QUERY + LATENT + ROTATED
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = x_ptr + token * WIDTH
    stride = num_tokens.to(tl.int64) * WIDTH
    place = tl.load(position_ptr + token).to(tl.int64) * (ROTATED // 2)
    if tl.program_id(1) == 0:
        latent = _normed(row + QUERY, stride, weight_ptr, eps, LATENT, LATENT_BLOCK, PARTIALS)
        slot = tl.load(slot_ptr + token).to(tl.int64)
        first_row = slot // BLOCK_TOKENS * unit_rows + layer * LAYER_ROWS
        out = pool_ptr + (first_row + slot % BLOCK_TOKENS) * (LATENT + ROTATED)
        column = tl.arange(0, LATENT_BLOCK)
        tl.store(out + column, latent.to(pool_ptr.dtype.element_ty), mask=(column < LATENT) & (slot >= 0))
        rotation = tl.arange(0, ROTATED // 2)
        inside = (rotation >= 0) & (slot >= 0)
        key = row + QUERY + LATENT
        _rotate(
            key, stride, rotation, cos_ptr + place, sin_ptr + place, out + LATENT, inside, ROTATED // 2, INTERLEAVED,
            PARTIALS,
        )  # fmt: skip
    elif QUERY_LATENT:
        normed = _normed(row, stride, query_weight_ptr, eps, QUERY, QUERY_BLOCK, PARTIALS)
        element = tl.arange(0, QUERY_BLOCK)
        tl.store(query_ptr + token * QUERY + element, normed.to(query_ptr.dtype.element_ty), mask=element < QUERY)
    else:
        first_head = (tl.program_id(1) - 1) * AT_ONCE
        _rotate_heads(
            row, stride, query_ptr + token * QUERY, first_head, cos_ptr + place, sin_ptr + place, PLAIN, PLAIN_BLOCK,
            ROTATED, AT_ONCE, INTERLEAVED, PARTIALS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_queries_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    query_ptr,
    num_tokens,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTIALS: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = HEADS * (PLAIN + ROTATED)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.load(position_ptr + token).to(tl.int64) * (ROTATED // 2)
    _rotate_heads(
        x_ptr + token * WIDTH, num_tokens.to(tl.int64) * WIDTH, query_ptr + token * WIDTH, tl.program_id(1) * AT_ONCE,
        cos_ptr + place, sin_ptr + place, PLAIN, PLAIN_BLOCK, ROTATED, AT_ONCE, INTERLEAVED, PARTIALS,
    )  # fmt: skip


def latent_write(
    x: torch.Tensor,
    latent_norm: torch.Tensor,
    query_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rope: RopeTables,
    pool: PagedPool,
    layer: int,
    query: torch.Tensor,
    *,
    interleaved: bool,
    pdl: bool = False,
) -> None:
    """Fills the slots [N] of one layer of the pool, of one unit of one plane of L + R elements, and `query`.

    x [N, Q + L + R] or partial sums [S, N, Q + L + R]; latent_norm [L]. query: with query_norm [Q] the normed latent of
    queries, [N, Q], else the queries [N, H, P + R] of Q elements. positions and slots: int32 or int64 [N]; a negative
    slot is padding, which is not written. The tables are those of R elements.
    """
    num_tokens, latent, rotated = len(query), latent_norm.shape[0], 2 * rope.cos.shape[1]
    width = query[0].numel() if num_tokens else 0
    pool.require_layer(layer)
    require(pool.tensor.shape[3] == 1 and pool.num_units == 1, "the pool is not of one unit of one plane")
    require(pool.head_dim == latent + rotated, f"rows of the pool have {pool.head_dim}, not {latent} + {rotated}")
    require(rope.cos.shape == rope.sin.shape, "tables differ in shape")
    require(rotated & (rotated - 1) == 0, f"{rotated} elements are rotated, no power of two")
    require(positions.shape == slots.shape == (num_tokens,), "positions and slots must be [num_tokens]")
    require(query.dtype == pool.dtype, f"query is {query.dtype}, the pool {pool.dtype}")
    for tensor in (x, latent_norm, query_norm, rope.cos, rope.sin, positions, slots, query):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_tokens == 0:
        return
    expected = (num_tokens, width + latent + rotated)
    require(tuple(x.shape[-2:]) == expected, f"x {tuple(x.shape)} is not {list(expected)}")
    plain, at_once, programs = 1, 1, 1
    if query_norm is None:
        plain, at_once = query.shape[2] - rotated, _heads_at_once(query.shape[1])
        programs = query.shape[1] // at_once
    else:
        require(tuple(query_norm.shape) == (width,), f"query_norm {tuple(query_norm.shape)} is not [{width}]")
    _latent_write_kernel[(num_tokens, 1 + programs)](
        x,
        latent_norm,
        latent_norm if query_norm is None else query_norm,
        rope.cos,
        rope.sin,
        positions,
        slots,
        pool.tensor,
        query,
        num_tokens,
        layer,
        pool.unit_rows,
        eps,
        QUERY=width,
        QUERY_BLOCK=next_power_of_2(width),
        PLAIN=plain,
        PLAIN_BLOCK=next_power_of_2(plain),
        LATENT=latent,
        LATENT_BLOCK=next_power_of_2(latent),
        ROTATED=rotated,
        BLOCK_TOKENS=pool.block_tokens,
        LAYER_ROWS=pool.layer_rows,
        AT_ONCE=at_once,
        QUERY_LATENT=query_norm is not None,
        INTERLEAVED=interleaved,
        PARTIALS=x.shape[0] if x.dim() == 3 else 1,
        PDL=pdl,
        **launch_options(4, pdl),
    )


def rotate_queries(
    x: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    query: torch.Tensor,
    *,
    interleaved: bool,
    pdl: bool = False,
) -> None:
    """Fills query [N, H, P + R] from x [N, H * (P + R)], or partial sums of it; positions int32 or int64 [N]."""
    num_tokens, heads, dim = query.shape
    rotated = 2 * rope.cos.shape[1]
    expected = (num_tokens, heads * dim)
    require(tuple(x.shape[-2:]) == expected, f"x {tuple(x.shape)} is not {list(expected)}")
    require(rotated & (rotated - 1) == 0 and rotated < dim, f"{rotated} of {dim} elements are rotated")
    for tensor in (x, rope.cos, rope.sin, positions, query):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_tokens == 0:
        return
    at_once = _heads_at_once(heads)
    _rotate_queries_kernel[(num_tokens, heads // at_once)](
        x,
        rope.cos,
        rope.sin,
        positions,
        query,
        num_tokens,
        HEADS=heads,
        PLAIN=dim - rotated,
        PLAIN_BLOCK=next_power_of_2(dim - rotated),
        ROTATED=rotated,
        AT_ONCE=at_once,
        INTERLEAVED=interleaved,
        PARTIALS=x.shape[0] if x.dim() == 3 else 1,
        PDL=pdl,
        **launch_options(4, pdl),
    )


def _heads_at_once(heads: int) -> int:
    return next(count for count in (4, 2, 1) if heads % count == 0)
