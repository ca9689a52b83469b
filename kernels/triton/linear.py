"""y = x W^T (+ b) for the few rows of a decode step, where the time is that of reading W once.

W is [N, K] as in the checkpoint, x [M, K]. Two kernels; `linear_policy` says which and with which tiles.
  * Several rows: a tile of W is the large operand of the warpgroup's matrix instruction and x the narrow one (operands
    exchanged), so that 16 rows cost one narrow product. With splits > 1 the float32 parts [splits, M, N] are left to
    the kernel that reads them (norm, rope_and_write), which adds them in order: no launch, no atomics.
  * One row: W streams through registers.
fused: W is [gate; up], [2 N, K], and y = silu(gate) * up (or gelu_tanh), so that the wide product never reaches memory.
added: [M, N] that the first split adds to some rows, such as what adapters add (`low_rank`). The kernel waits for it
alone, and behind the sum: all else that it reads must be there when it begins. Where added has scales, each split of a
row is multiplied by those of its adapter, before anything is added to it.
K is summed in steps of 16 in one order whatever the tiles, so with one number of splits a row's bits are the same for
every M (checked on an H200). With pdl the first columns of W are asked for before the kernel before has ended: weights
do not depend on it. Bytes: W, N * K * element size (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.activation import activated
from baton.kernels.triton.launch import cdiv, launch_options, require
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.low_rank import AddedRows


@triton.jit
def prefetch(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks the L2 cache for ROWS x COLUMNS elements of 16 bits, one instruction each 128 bytes."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS // 64)[None, :]
    address = (ptr + row * stride + column * 64).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_rows"])
def _linear_rows_kernel(
    x_desc, weight_desc, weight_ptr, bias_ptr, out_ptr, added_ptr, adapters_ptr, scales_ptr, scales_stride, num_rows,
    N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_M: tl.constexpr,
    SPLITS: tl.constexpr, FUSED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, PREFETCH: tl.constexpr,
    ADDED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0) * TILE_M
    first_n = tl.program_id(1) * TILE_N
    split = tl.program_id(2)
    first_k = split * (K // SPLITS)
    n = first_n + tl.arange(0, TILE_N)
    m = first_m + tl.arange(0, TILE_M)
    if ADDED:  # whose adapters these are was written before the chain of early launches began
        adds = (tl.load(adapters_ptr + m, mask=m < num_rows, other=-1) >= 0) & (split == 0)
        added_place = added_ptr + m[None, :].to(tl.int64) * (2 * N if FUSED else N) + n[:, None]
    if PDL:
        gdc_launch_dependents()
        if not ADDED:
            if PREFETCH > 0:
                prefetch(weight_ptr + first_n.to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
                if FUSED:
                    prefetch(weight_ptr + (N + first_n).to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
            gdc_wait()
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    if FUSED:
        up = tl.zeros([TILE_N, TILE_M], tl.float32)
        for k in tl.range(first_k, first_k + K // SPLITS, TILE_K):
            x = x_desc.load([first_m, k])
            total = tl.dot(weight_desc.load([first_n, k]), x.T, total, input_precision="ieee")
            up = tl.dot(weight_desc.load([N + first_n, k]), x.T, up, input_precision="ieee")
    else:
        for k in tl.range(first_k, first_k + K // SPLITS, TILE_K):
            x = x_desc.load([first_m, k])
            total = tl.dot(weight_desc.load([first_n, k]), x.T, total, input_precision="ieee")
    if SCALED:
        slot = tl.load(adapters_ptr + m, mask=m < num_rows, other=-1)[None, :]
        scale_place = scales_ptr + slot.to(tl.int64) * scales_stride + n[:, None]
        total *= tl.load(scale_place, mask=slot >= 0, other=1.0)
        if FUSED:
            up *= tl.load(scale_place + N, mask=slot >= 0, other=1.0)
    if BIAS:  # noqa: SIM102 - known when compiling, the next one is not
        if split == 0:
            total += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    if ADDED:
        if PDL:
            gdc_wait()
        added = tl.load(added_place, mask=adds[None, :], other=0.0)
        if FUSED:
            up_added = tl.load(added_place + N, mask=adds[None, :], other=0.0)
        total += added.to(tl.float32)
        if FUSED:
            up += up_added.to(tl.float32)
    if FUSED:
        total = activated(total, GELU) * up
    place = out_ptr + split.to(tl.int64) * num_rows * N + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(m < num_rows)[None, :])


@triton.jit
def row_product(x_ptr, place, up_place, weight, up_weight, K: tl.constexpr, TILE_K: tl.constexpr, FUSED: tl.constexpr):
    """Of one row x [K] with the rows of W whose columns `place` points to, and with those of `up_place`; [TILE_N] each.
    weight and up_weight: their first blocks. One block is always on its way: the next is asked for before the last is
    used. Without FUSED the second is without meaning."""
    column = tl.arange(0, TILE_K)
    total = tl.zeros(weight.shape, tl.float32)
    up = tl.zeros(weight.shape, tl.float32)
    for k in tl.range(0, K, TILE_K, num_stages=1, loop_unroll_factor=2):
        following = tl.where(k + TILE_K < K, k + TILE_K, 0)
        used = weight.to(tl.float32)
        weight = tl.load(place + following, eviction_policy="evict_first")
        x = tl.load(x_ptr + k + column).to(tl.float32)
        total += used * x[None, :]
        if FUSED:
            used = up_weight.to(tl.float32)
            up_weight = tl.load(up_place + following, eviction_policy="evict_first")
            up += used * x[None, :]
    return tl.sum(total, 1), tl.sum(up, 1)


@triton.jit
def _linear_row_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, added_ptr, adapters_ptr, scales_ptr, scales_stride, N: tl.constexpr,
    K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, FUSED: tl.constexpr, GELU: tl.constexpr,
    BIAS: tl.constexpr, ADDED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    column = tl.arange(0, TILE_K)
    place = weight_ptr + n[:, None].to(tl.int64) * K + column[None, :]
    weight = tl.load(place, eviction_policy="evict_first")
    up_place = place + N * K if FUSED else place
    up_weight = tl.load(up_place, eviction_policy="evict_first") if FUSED else weight
    if ADDED:
        slot = tl.load(adapters_ptr)
        adds = slot >= 0
    if PDL:
        gdc_launch_dependents()
        if not ADDED:
            gdc_wait()
    result, other = row_product(x_ptr, place, up_place, weight, up_weight, K, TILE_K, FUSED)
    if SCALED:
        scale_place = scales_ptr + slot.to(tl.int64) * scales_stride + n
        result *= tl.load(scale_place, mask=(n >= 0) & adds, other=1.0)
        if FUSED:
            other *= tl.load(scale_place + N, mask=(n >= 0) & adds, other=1.0)
    if ADDED:
        if PDL:
            gdc_wait()
        added = tl.load(added_ptr + n, mask=(n >= 0) & adds, other=0.0)
        if FUSED:
            other += tl.load(added_ptr + N + n, mask=(n >= 0) & adds, other=0.0).to(tl.float32)
        result += added.to(tl.float32)
    if FUSED:
        result = activated(result, GELU) * other
    if BIAS:
        result += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    fused: bool = False,
    gelu: bool = False,
    added: AddedRows | None = None,
    pdl: bool = False,
) -> None:
    """Fills out [M, N], or [splits, M, N] float32; x [M, K], weight [N, K] ([2 N, K] when fused), bias [N] or None.

    The tiles must divide N and K / splits. A fused product has one split and no bias; its activation is silu, or with
    `gelu` gelu_tanh. added: [M, N] ([M, 2 N] when fused).
    """
    num_rows, k = x.shape
    n = weight.shape[0] // (2 if fused else 1)
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(weight.shape[1] == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(n % tiles.tile_n == 0 and k % (tiles.splits * tiles.tile_k) == 0, f"{tiles} do not divide [{n}, {k}]")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    for tensor in (x, weight, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    sums = weight if bias is None else bias
    values, adapters = (x, x) if added is None else (added.values, added.adapters)
    scaled = added is not None and added.scales is not None
    scales = values if added is None or added.scales is None else added.scales
    stride = scales.stride(0) if scaled else 0
    if added is not None:
        require(tuple(values.shape) == (num_rows, len(weight)) and values.is_contiguous(), "added of another shape")
        require(tuple(adapters.shape) == (num_rows,), "added of other rows")
        require(not scaled or (scales.shape[1] == len(weight) and scales.stride(1) == 1), "scales of another shape")
    if tiles.tile_m == 0:
        require(num_rows == 1 and tiles.splits == 1, "these tiles are for one row")
        _linear_row_kernel[(n // tiles.tile_n,)](
            x, weight, sums, out, values, adapters, scales, stride, N=n, K=k, TILE_N=tiles.tile_n,
            TILE_K=tiles.tile_k, FUSED=fused, GELU=gelu, BIAS=bias is not None, ADDED=added is not None,
            SCALED=scaled, PDL=pdl, **launch_options(tiles.warps, pdl, 1),
        )  # fmt: skip
        return
    _linear_rows_kernel[(cdiv(num_rows, tiles.tile_m), n // tiles.tile_n, tiles.splits)](
        TensorDescriptor.from_tensor(x, [tiles.tile_m, tiles.tile_k]),
        TensorDescriptor.from_tensor(weight, [tiles.tile_n, tiles.tile_k]),
        weight, sums, out, values, adapters, scales, stride, num_rows, N=n, K=k, TILE_N=tiles.tile_n,
        TILE_K=tiles.tile_k, TILE_M=tiles.tile_m, SPLITS=tiles.splits, FUSED=fused, GELU=gelu, BIAS=bias is not None,
        PREFETCH=tiles.prefetch, ADDED=added is not None, SCALED=scaled, PDL=pdl,
        **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip
