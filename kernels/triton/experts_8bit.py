"""`experts` where a weight is a byte, FP8 (e4m3) or INT8, with scales of outputs or of blocks of 128 x 128.

x is in codes too, so that the matrix unit multiplies bytes by bytes. Of FP8 it adds up 128 products, and what it added
up is added in float32, as in `linear_8bit`. The product of gate and up leaves silu(gate) * up in codes as well, with a
scale for each run of 128 outputs, which one program has at hand: what `down` reads needs no launch between.
Scales of W: float32 [E * N], or [E * N / 128, K / 128]. A row's bits depend on that row alone.
Bytes: W of the experts that were chosen, N * K each (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.reference import LARGEST_CODE
from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.linear_8bit import BLOCK, prefetch_bytes, scale_of
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.quantise import SMALLEST, CodedRows, codes_of
from baton.kernels.triton.route import Routes


@triton.jit(do_not_specialize=["num_rows", "scale_stride"])
def _experts_8bit_kernel(
    x_desc, weight_desc, x_ptr, x_scale_ptr, codes_ptr, scale_ptr, tokens_ptr, experts_ptr, sizes_ptr, num_tiles_ptr,
    out_ptr, out_scale_ptr, num_rows, scale_stride, N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, TILE_M: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr,
    GATHERED: tl.constexpr, BLOCKED: tl.constexpr, RUNS: tl.constexpr, CODED: tl.constexpr, LARGEST: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCKED: W has scales of blocks. RUNS: x has scales of runs. CODED: so has out, which is codes."""
    tile, first_n = tl.program_id(0), tl.program_id(1) * TILE_N
    if PDL and GATHERED:
        gdc_wait()
        gdc_launch_dependents()
    if tile >= tl.load(num_tiles_ptr):
        return
    ROWS: tl.constexpr = 2 * N if FUSED else N
    expert = tl.load(experts_ptr + tile)
    first_row = expert * ROWS + first_n
    if PDL and not GATHERED:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_bytes(codes_ptr + first_row.to(tl.int64) * K, K, TILE_N, PREFETCH)
        gdc_wait()
    size = tl.load(sizes_ptr + tile)
    m, n, column = tl.arange(0, TILE_M), first_n + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    first_m = tile * TILE_M
    inside = m < size
    row = first_m + m
    if GATHERED:
        row = tl.load(tokens_ptr + first_m + m, mask=inside, other=0)
        x_place = x_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
    scales = scale_ptr + first_row // BLOCK * (K // BLOCK)
    up_scales = scales + N // BLOCK * (K // BLOCK)
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    up = total
    if BLOCKED or RUNS or codes_ptr.dtype.element_ty != tl.int8:
        for k in tl.range(0, K, TILE_K, num_stages=STAGES):
            x = tl.load(x_place + k) if GATHERED else x_desc.load([first_m, k])
            x_scale = tl.full([1, 1], 1.0, tl.float32)
            if RUNS:
                x_scale = tl.load(x_scale_ptr + k // BLOCK * scale_stride + row, mask=inside, other=0.0)[None, :]
            scale = x_scale * scale_of(scales, k, BLOCK, BLOCKED)
            total += tl.dot(weight_desc.load([first_row, k]), x.T).to(tl.float32) * scale
            if FUSED:
                scale = x_scale * scale_of(up_scales, k, BLOCK, BLOCKED)
                up += tl.dot(weight_desc.load([first_row + N, k]), x.T).to(tl.float32) * scale
    else:
        sums = tl.zeros([TILE_N, TILE_M], tl.int32)
        up_sums = sums
        for k in tl.range(0, K, TILE_K, num_stages=STAGES):
            x = tl.load(x_place + k) if GATHERED else x_desc.load([first_m, k])
            sums = tl.dot(weight_desc.load([first_row, k]), x.T, sums, out_dtype=tl.int32)
            if FUSED:
                up_sums = tl.dot(weight_desc.load([first_row + N, k]), x.T, up_sums, out_dtype=tl.int32)
        total, up = sums.to(tl.float32), up_sums.to(tl.float32)
    if not RUNS:
        x_scale = tl.load(x_scale_ptr + row, mask=inside, other=0.0)[None, :]
        total *= x_scale
        if FUSED:
            up *= x_scale
    if not BLOCKED:
        of_outputs = scale_ptr + expert * ROWS + n
        total *= tl.load(of_outputs)[:, None]
        if FUSED:
            up *= tl.load(of_outputs + N)[:, None]
    if FUSED:
        total = total / (1.0 + tl.exp(-total)) * up
    place = out_ptr + (first_m + m).to(tl.int64)[None, :] * N + n[:, None]
    if CODED:
        total = tl.where(inside[None, :], total, 0.0)
        most = tl.max(tl.abs(total), 0)
        factor = tl.div_rn(LARGEST, tl.maximum(most, SMALLEST))
        tl.store(out_scale_ptr + first_n // TILE_N * num_rows + first_m + m, tl.div_rn(most, LARGEST), mask=inside)
        tl.store(place, codes_of(total, factor[None, :], out_ptr), mask=inside[None, :])
    else:
        tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside[None, :])


def experts_8bit(
    x: CodedRows,
    codes: torch.Tensor,
    scales: torch.Tensor,
    routes: Routes,
    tiles: Tiles,
    out: torch.Tensor | CodedRows,
    *,
    fused: bool = False,
    gathered: bool = False,
    pdl: bool = False,
) -> None:
    """Fills the rows of out [P, N] that some token has, P = most_tiles * tile_m; in codes with scales [N / 128, P].

    codes [E, N, K] ([E, 2 N, K] when fused) FP8 or INT8; scales float32 [E * N] or [E * N / 128, K / 128] (twice that
    when fused); x: T rows of K if gathered, else P, with scales of rows or of runs of 128.
    """
    k, n = codes.shape[2], codes.shape[1] // (2 if fused else 1)
    all_outputs, num_rows = codes.shape[0] * codes.shape[1], routes.most_tiles * routes.tile_m
    coded = isinstance(out, CodedRows)
    values = out.codes if isinstance(out, CodedRows) else out
    blocked, runs = scales.dim() == 2, x.scales.dim() == 2
    given = len(routes.positions) if gathered else num_rows
    require(tuple(x.codes.shape) == (given, k), f"x {tuple(x.codes.shape)} is not {(given, k)}")
    require(tuple(values.shape) == (num_rows, n), f"out {tuple(values.shape)} is not {(num_rows, n)}")
    require(n % tiles.tile_n == 0 and k % tiles.tile_k == 0, f"{tiles} do not divide [{n}, {k}]")
    require(tiles.splits == 1 and routes.tile_m == tiles.tile_m, f"{tiles} for tiles of {routes.tile_m} rows")
    wanted = (all_outputs // BLOCK, k // BLOCK) if blocked else (all_outputs,)
    require(tuple(scales.shape) == wanted and scales.dtype == torch.float32, f"scales {tuple(scales.shape)}")
    require(not blocked or (n % BLOCK == k % BLOCK == 0 and BLOCK % tiles.tile_n == 0), f"{tiles} cut through blocks")
    require(x.codes.dtype == codes.dtype and x.scales.dtype == torch.float32, "x is not in codes of W's type")
    if runs:
        fits = x.scales.shape[0] * BLOCK == k and x.scales.shape[1] >= given
        require(fits, f"scales of x {tuple(x.scales.shape)}")
    else:
        require(tuple(x.scales.shape) == (given,), f"scales of x {tuple(x.scales.shape)}")
    step = min(BLOCK, tiles.tile_k)
    if isinstance(out, CodedRows):
        require(values.dtype == codes.dtype and tiles.tile_n == BLOCK, "out is not in codes of W's type, and of runs")
        require(tuple(out.scales.shape) == (n // BLOCK, num_rows), f"scales of out {tuple(out.scales.shape)}")
    for tensor in (*x, codes, scales, values):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    weight_desc = TensorDescriptor.from_tensor(codes.view(-1, k), [tiles.tile_n, step])
    x_desc = weight_desc if gathered else TensorDescriptor.from_tensor(x.codes, [tiles.tile_m, step])
    _experts_8bit_kernel[(routes.most_tiles, n // tiles.tile_n)](
        x_desc, weight_desc, x.codes, x.scales, codes, scales, routes.tokens, routes.experts, routes.sizes,
        routes.num_tiles, values, out.scales if isinstance(out, CodedRows) else x.scales, num_rows, x.scales.shape[-1],
        N=n, K=k, TILE_N=tiles.tile_n, TILE_K=step, TILE_M=tiles.tile_m, STAGES=tiles.stages, BLOCK=BLOCK,
        FUSED=fused, GATHERED=gathered, BLOCKED=blocked, RUNS=runs, CODED=coded,
        LARGEST=LARGEST_CODE[codes.dtype] if coded else 0.0, PREFETCH=tiles.prefetch, PDL=pdl,
        **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip
