"""y = x W^T (+ b) for few rows of x where a weight is a byte: W[n, k] = codes[n, k] * scale, codes FP8 (e4m3) or INT8.

A scale belongs to an output (scales [N]), or to a block of 128 outputs and 128 inputs ([N / 128, K / 128]). This is the
kernel of `linear` for several rows with other operands: W lies in memory as in the checkpoint and is read once, split
parts of K are left in float32 to the kernel that reads them, and x is in codes too (`quantise`), so that the matrix
unit multiplies bytes by bytes. Of FP8 it adds up 128 products, and what it added up is added in float32: it keeps 14
bits and cuts off the rest, which made 0.8 % of a sum of 1024 products of one sign. One row takes the same kernel: a
product with W widened to 16 or 32 bits is slower than one of 16 rows in codes.
K is added up in steps of 32 in one order whatever the tiles, so with one number of splits a row's bits are the same for
every M. Bytes: W, N * K (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.launch import cdiv, launch_options, require
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.quantise import RUN, CodedRows

BLOCK = 128
"""Outputs, and inputs, that share a scale."""
NARROWEST = 32
"""Rows whose scales the copy engine fetches: fewer are no 128 bytes, to which it aligns them."""


@triton.jit
def prefetch_bytes(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks the L2 cache for ROWS x COLUMNS bytes, one instruction each 128."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS // 128)[None, :]
    address = (ptr + row * stride + column * 128).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def scale_of(scale_ptr, k, BLOCK: tl.constexpr, BLOCKED: tl.constexpr):
    """Of the block at column k, as a tile: the compiler asks for tiles ahead, for single numbers not."""
    if BLOCKED:
        return tl.load(scale_ptr + k // BLOCK + tl.zeros([1, 1], tl.int32))
    else:
        return tl.full([1, 1], 1.0, tl.float32)


@triton.jit(do_not_specialize=["num_rows", "scale_stride"])
def _linear_8bit_rows_kernel(
    x_desc, x_scale_desc, codes_desc, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, scale_stride,
    N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_M: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, BLOCKED: tl.constexpr,
    RUNS: tl.constexpr, FETCHED: tl.constexpr, BIAS: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCKED: W has scales of blocks; RUNS: x has scales of runs, FETCHED by the copy engine."""
    first_m = tl.program_id(0) * TILE_M
    first_n = tl.program_id(1) * TILE_N
    split = tl.program_id(2)
    first_k = split * (K // SPLITS)
    end_k = first_k + K // SPLITS
    n = first_n + tl.arange(0, TILE_N)
    m = first_m + tl.arange(0, TILE_M)
    inside = m < num_rows
    scales = scale_ptr + first_n // BLOCK * (K // BLOCK)
    up_scales = scales + N // BLOCK * (K // BLOCK)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch_bytes(codes_ptr + first_n.to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
            if FUSED:
                prefetch_bytes(codes_ptr + (N + first_n).to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
        gdc_wait()
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    up = total
    if BLOCKED or RUNS:
        for k in tl.range(first_k, end_k, TILE_K, num_stages=STAGES):
            for part in tl.static_range(TILE_K // BLOCK):
                here = k + part * BLOCK
                x = x_desc.load([first_m, here])
                x_scale = tl.full([1, 1], 1.0, tl.float32)
                if FETCHED:
                    x_scale = x_scale_desc.load([here // BLOCK, first_m])
                elif RUNS:
                    x_scale = tl.load(x_scale_ptr + here // BLOCK * scale_stride + m, mask=inside, other=0.0)[None, :]
                scale = x_scale * scale_of(scales, here, BLOCK, BLOCKED)
                total += tl.dot(codes_desc.load([first_n, here]), x.T).to(tl.float32) * scale
                if FUSED:
                    scale = x_scale * scale_of(up_scales, here, BLOCK, BLOCKED)
                    up += tl.dot(codes_desc.load([N + first_n, here]), x.T).to(tl.float32) * scale
    else:
        sums = tl.zeros([TILE_N, TILE_M], tl.int32 if codes_ptr.dtype.element_ty == tl.int8 else tl.float32)
        up_sums = sums
        for k in tl.range(first_k, end_k, TILE_K):
            x = x_desc.load([first_m, k])
            sums = tl.dot(codes_desc.load([first_n, k]), x.T, sums, max_num_imprecise_acc=BLOCK, out_dtype=sums.dtype)
            if FUSED:
                up_sums = tl.dot(
                    codes_desc.load([N + first_n, k]), x.T, up_sums, max_num_imprecise_acc=BLOCK, out_dtype=sums.dtype
                )
        total, up = sums.to(tl.float32), up_sums.to(tl.float32)
    if not RUNS:
        x_scale = tl.load(x_scale_ptr + m, mask=inside, other=0.0)[None, :]
        total *= x_scale
        if FUSED:
            up *= x_scale
    if not BLOCKED:
        total *= tl.load(scale_ptr + n)[:, None]
        if FUSED:
            up *= tl.load(scale_ptr + N + n)[:, None]
    if FUSED:
        total = total / (1.0 + tl.exp(-total)) * up
    elif BIAS:  # noqa: SIM102 - known when compiling, the next one is not
        if split == 0:
            total += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    place = out_ptr + split.to(tl.int64) * num_rows * N + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside[None, :])


def linear_8bit(
    x: CodedRows,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    fused: bool = False,
    pdl: bool = False,
) -> None:
    """Fills out [M, N], or [splits, M, N] float32.

    x: M rows of K; codes [N, K] ([2 N, K] when fused) FP8 or INT8; scales float32 [N] or [N / 128, K / 128] (twice that
    when fused); bias [N] or None. The tiles must divide N and K / splits. A fused product has one split and no bias.
    """
    (num_rows, k), n = x.codes.shape, codes.shape[0] // (2 if fused else 1)
    blocked, runs = scales.dim() == 2, x.scales.dim() == 2
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(codes.shape[1] == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(n % tiles.tile_n == 0 and k % (tiles.splits * tiles.tile_k) == 0, f"{tiles} do not divide [{n}, {k}]")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    wanted = (codes.shape[0] // BLOCK, k // BLOCK) if blocked else (codes.shape[0],)
    require(tuple(scales.shape) == wanted and scales.dtype == torch.float32, f"scales {tuple(scales.shape)}")
    require(not blocked or (n % BLOCK == k % BLOCK == 0 and BLOCK % tiles.tile_n == 0), f"{tiles} cut through blocks")
    require(x.codes.dtype == codes.dtype and x.scales.dtype == torch.float32, "x is not in codes of W's type")
    if runs:
        require(x.scales.shape[0] * RUN == k and x.scales.shape[1] >= num_rows, f"scales of x {tuple(x.scales.shape)}")
        require(x.scales.shape[1] % 4 == 0, "room for scales of runs must be a multiple of 4 rows")
    else:
        require(tuple(x.scales.shape) == (num_rows,), f"scales of x {tuple(x.scales.shape)}")
    require(not (blocked or runs) or tiles.tile_k % BLOCK == 0, "scales of blocks and runs are for every 128 columns")
    for tensor in (*x, codes, scales, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    step = BLOCK if blocked or runs else tiles.tile_k
    weight_desc = TensorDescriptor.from_tensor(codes, [tiles.tile_n, step])
    fetched = runs and tiles.tile_m >= NARROWEST
    _linear_8bit_rows_kernel[(cdiv(num_rows, tiles.tile_m), n // tiles.tile_n, tiles.splits)](
        TensorDescriptor.from_tensor(x.codes, [tiles.tile_m, step]),
        TensorDescriptor.from_tensor(x.scales, [1, tiles.tile_m]) if fetched else weight_desc,
        weight_desc, x.scales, codes, scales, scales if bias is None else bias, out, num_rows, x.scales.shape[-1], N=n,
        K=k, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, TILE_M=tiles.tile_m, STAGES=tiles.stages, SPLITS=tiles.splits,
        BLOCK=BLOCK, FUSED=fused, BLOCKED=blocked, RUNS=runs, FETCHED=fetched, BIAS=bias is not None,
        PREFETCH=tiles.prefetch, PDL=pdl, **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip
