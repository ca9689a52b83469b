"""`experts_8bit` for one token, whose time is that of reading the bytes of the experts it chose.

    y[p] = scale * sum_k codes[e(p), n, k] * x[k],  fused: silu(gate) * up

Tiles of W, x and scales are asked for some steps ahead and wait in shared memory; a program widens its bytes to
float32. The sums of 16 neighbouring products, which are one thread's, are multiplied by their block's scale, so a scale
costs one operation in 17. Matrix instructions would multiply 16 rows of which one is real, in tiles so wide that a
third of the multiprocessors have work. x and what gate and up leave stay in 16 bits: nothing is put into codes.
Bytes: W of the experts that were chosen, N * K each (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.experts_policy import BLOCK
from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.linear_8bit import prefetch_bytes
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.route import Routes

PIECE = 16
"""Codes that a thread loads at once."""


@triton.jit
def _pieces(codes, x, scales_at, PIECE: tl.constexpr, BLOCKED: tl.constexpr):
    """The sums of each PIECE of products: [TILE_N, TILE_K / PIECE]."""
    products = codes.to(tl.float32) * x[None, :]
    sums = tl.sum(tl.reshape(products, [codes.shape[0], codes.shape[1] // PIECE, PIECE]), 2)
    return sums * tl.load(scales_at)[None, :] if BLOCKED else sums


@triton.jit
def _experts_8bit_row_kernel(
    x_ptr, codes_ptr, scale_ptr, experts_ptr, num_tiles_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    FUSED: tl.constexpr, GATHERED: tl.constexpr, BLOCKED: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The loop has no loads of its own: the compiler asks for STAGES - 1 tiles ahead. Bytes that it carried in
    registers would take one each."""
    tile, first_n = tl.program_id(1), tl.program_id(0) * TILE_N
    if PDL and GATHERED:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    if tile >= tl.load(num_tiles_ptr):
        return
    ROWS: tl.constexpr = 2 * N if FUSED else N
    n, column, piece = tl.arange(0, TILE_N), tl.arange(0, TILE_K), tl.arange(0, TILE_K // PIECE)
    first_row = tl.load(experts_ptr + tile).to(tl.int64) * ROWS + first_n
    place = codes_ptr + (first_row + n)[:, None] * K + column[None, :]
    if PDL and not GATHERED:
        if PREFETCH > 0:
            prefetch_bytes(codes_ptr + first_row * K, K, TILE_N, PREFETCH)
        gdc_wait()
    x_row = x_ptr if GATHERED else x_ptr + tile * K
    scales = scale_ptr + first_row // BLOCK * (K // BLOCK)
    total = tl.zeros([TILE_N, TILE_K // PIECE], tl.float32)
    up = total
    for k in tl.range(0, K, TILE_K, num_stages=STAGES):
        codes = tl.load(place + k, eviction_policy="evict_first")
        x = tl.load(x_row + k + column).to(tl.float32)
        scales_at = scales + (k + piece * PIECE) // BLOCK
        total += _pieces(codes, x, scales_at, PIECE, BLOCKED)
        if FUSED:
            up_codes = tl.load(place + N * K + k, eviction_policy="evict_first")
            up += _pieces(up_codes, x, scales_at + N // BLOCK * (K // BLOCK), PIECE, BLOCKED)
    result, up_result = tl.sum(total, 1), tl.sum(up, 1)
    if not BLOCKED:
        result *= tl.load(scale_ptr + first_row + n)
        if FUSED:
            up_result *= tl.load(scale_ptr + first_row + N + n)
    if FUSED:
        result = result / (1.0 + tl.exp(-result)) * up_result
    tl.store(out_ptr + tile.to(tl.int64) * N + first_n + n, result.to(out_ptr.dtype.element_ty))


def experts_8bit_row(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    routes: Routes,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    fused: bool = False,
    gathered: bool = False,
    pdl: bool = False,
) -> None:
    """Fills the rows of out [most_tiles, N] that the token has; routes of one token, in tiles of one row.

    codes [E, N, K] ([E, 2 N, K] when fused) FP8 or INT8; scales float32 [E * N] or [E * N / 128, K / 128] (twice that
    when fused); x plain: [1, K] if gathered, else [most_tiles, K].
    """
    k, n = codes.shape[2], codes.shape[1] // (2 if fused else 1)
    all_outputs, num_rows = codes.shape[0] * codes.shape[1], routes.most_tiles
    blocked = scales.dim() == 2
    require(len(routes.positions) == 1 and routes.tile_m == 1, "these tiles are for one token")
    require(tuple(x.shape) == (1 if gathered else num_rows, k), f"x {tuple(x.shape)}")
    require(tuple(out.shape) == (num_rows, n), f"out {tuple(out.shape)} is not {(num_rows, n)}")
    require(n % tiles.tile_n == 0 and k % tiles.tile_k == 0, f"{tiles} do not divide [{n}, {k}]")
    require(tiles.splits == 1 and tiles.tile_m == 0, f"{tiles} are not for one row")
    wanted = (all_outputs // BLOCK, k // BLOCK) if blocked else (all_outputs,)
    require(tuple(scales.shape) == wanted and scales.dtype == torch.float32, f"scales {tuple(scales.shape)}")
    require(not blocked or (n % BLOCK == k % BLOCK == 0 and BLOCK % tiles.tile_n == 0), f"{tiles} cut through blocks")
    for tensor in (x, codes, scales, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    _experts_8bit_row_kernel[(n // tiles.tile_n, num_rows)](
        x, codes, scales, routes.experts, routes.num_tiles, out, N=n, K=k, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k,
        STAGES=tiles.stages, BLOCK=BLOCK, PIECE=PIECE, FUSED=fused, GATHERED=gathered, BLOCKED=blocked,
        PREFETCH=tiles.prefetch, PDL=pdl, **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip
