"""y = x W^T (+ b) of many rows on Hopper where both are INT8 with a scale a row, in Gluon: sums of bytes, then scaled.

As product_gluon: x is [M, K] in codes, W [N, K] ([gate; up] of [2 N, K] if fused, and y = silu(gate) * up), y [M, N]
bfloat16. One program a multiprocessor takes tile after tile; one warp loads (TMA) into a ring of stages of 128 inputs;
each of two warpgroups computes 64 rows of x by two halves of W: gate and up, or neighbours. Sums are int32, so exact,
and never reach memory: cuBLAS would leave them there to be scaled (docs/benchmarks/kernels.md).

Any M and N; K a multiple of 128, N of 8. Gluon is experimental: `prefill_gluon.is_available`. Bytes: W, x and y once
each at best.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from baton.kernels.triton.gluon_boxes import boxes
from baton.kernels.triton.launch import cdiv, require
from baton.kernels.triton.linear_8bit_policy import BLOCK, MANY_STAGES, fit_many_rows
from baton.kernels.triton.product_gluon import place, silu, sum_of_ring
from baton.kernels.triton.quantise import CodedRows

STEP = BLOCK  # columns of K a stage: one swizzle of 128 bytes
CONSUMERS = 2
HALF, STAGES, GROUP_M = 128, MANY_STAGES, 16


@gluon.jit
def _producer(
    x_desc, codes_desc, x_tiles, code_tiles, full, empty, tiles_m, tiles_n, second, k_size, TILE_N: gl.constexpr,
    HALF: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, STEP], gl.int8)
    halves = code_tiles._reinterpret(gl.int8, [STAGES * 2, HALF, STEP], half_layout)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = tile_m * (64 * CONSUMERS), tile_n * TILE_N
        for k in range(0, k_size, STEP):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (64 * CONSUMERS + 2 * HALF) * STEP)
            for i in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    x_desc, [first_m + 64 * i, k], bar, x_tiles.index(stage * CONSUMERS + i)
                )
            tma.async_copy_global_to_shared(codes_desc, [first_n, k], bar, halves.index(stage * 2))
            tma.async_copy_global_to_shared(codes_desc, [first_n + second, k], bar, halves.index(stage * 2 + 1))
            step += 1


@gluon.jit
def _scaled(sums, x_scale, scale_ptr, bias_ptr, column, inside, BIAS: gl.constexpr):
    values = sums.to(gl.float32) * gl.expand_dims(x_scale, 1)
    values *= gl.expand_dims(gl.load(scale_ptr + column, mask=inside, other=0.0), 0)
    if BIAS:
        values += gl.expand_dims(gl.load(bias_ptr + column, mask=inside, other=0.0).to(gl.float32), 0)
    return values


@gluon.jit
def _leave(values, out_desc, out_tile, row, column):
    """Through shared memory, when what was there before has left."""
    tma.store_wait(0)
    out_tile.store(values.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_tile)


@gluon.jit
def _consumer(
    x_scale_ptr, scale_ptr, bias_ptr, out_desc, x_tiles, code_tiles, out_tiles, full, empty, tiles_m, tiles_n, second,
    num_rows, n, k_size, TILE_N: gl.constexpr, FUSED: gl.constexpr, BIAS: gl.constexpr, HALF: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    # Triton has no instruction for INT8 with 256 columns: two of 128.
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 32])
    out_tile = out_tiles.index(GROUP)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * (64 * CONSUMERS) + 64 * GROUP, tile_n * TILE_N
        sums = gl.zeros([64, 2 * HALF], gl.int32, layout=SUMS)
        sums, step = sum_of_ring(
            sums, step, x_tiles, code_tiles, full, empty, k_size, STEP, STAGES, CONSUMERS, GROUP
        )  # fmt: skip
        left, right = sums.reshape([64, 2, HALF]).permute(0, 2, 1).split()
        left = gl.convert_layout(left, SUMS, assert_trivial=True)
        right = gl.convert_layout(right, SUMS, assert_trivial=True)
        m = row + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
        x_scale = gl.load(x_scale_ptr + m, mask=m < num_rows, other=0.0)
        here = column + gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))
        left = _scaled(left, x_scale, scale_ptr, bias_ptr, here, here < n, BIAS)
        inside = here < n if FUSED else here + HALF < n
        right = _scaled(right, x_scale, scale_ptr, bias_ptr, here + second, inside, BIAS)
        if FUSED:
            _leave(silu(left) * right, out_desc, out_tile, row, column)
        else:
            _leave(left, out_desc, out_tile, row, column)
            _leave(right, out_desc, out_tile, row, column + HALF)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "second", "num_rows", "n", "k_size"])
def _product_8bit_kernel(
    x_desc, codes_desc, out_desc, x_scale_ptr, scale_ptr, bias_ptr, tiles_m, tiles_n, second, num_rows, n, k_size,
    FUSED: gl.constexpr, BIAS: gl.constexpr, HALF: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    TILE_N: gl.constexpr = HALF if FUSED else 2 * HALF
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, STEP], gl.int8)
    codes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * HALF, STEP], gl.int8)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HALF], gl.bfloat16)
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES * CONSUMERS, 64, STEP], x_layout)
    code_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, 2 * HALF, STEP], codes_layout)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, HALF], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    x_scale_ptr, scale_ptr, bias_ptr, out_desc, x_tiles, code_tiles, out_tiles, full, empty, tiles_m,
                    tiles_n, second, num_rows, n, k_size, TILE_N, FUSED, BIAS, HALF, STEP, STAGES, CONSUMERS, GROUP_M,
                    0,
                ),
            ),
            (
                _consumer,
                (
                    x_scale_ptr, scale_ptr, bias_ptr, out_desc, x_tiles, code_tiles, out_tiles, full, empty, tiles_m,
                    tiles_n, second, num_rows, n, k_size, TILE_N, FUSED, BIAS, HALF, STEP, STAGES, CONSUMERS, GROUP_M,
                    1,
                ),
            ),
            (
                _producer,
                (
                    x_desc, codes_desc, x_tiles, code_tiles, full, empty, tiles_m, tiles_n, second, k_size, TILE_N,
                    HALF, STEP, STAGES, CONSUMERS, GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def product_8bit(
    x: CodedRows,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    num_sms: int,
    out: torch.Tensor,
    *,
    fused: bool = False,
) -> None:
    """Fills out [M, N]; x [M, K] and codes [N, K] ([2 N, K] when fused) INT8; scales float32 [N] (twice that when
    fused); bias [N] or None. A fused product has no bias."""
    (num_rows, k), n = x.codes.shape, codes.shape[0] // (2 if fused else 1)
    require(codes.shape[1] == k and tuple(out.shape) == (num_rows, n), f"out {tuple(out.shape)}")
    require(fit_many_rows(n, k), f"a product of {k} inputs and {n} outputs")
    require(
        x.codes.dtype == codes.dtype == torch.int8 and out.dtype == torch.bfloat16, "not INT8, or not into bfloat16"
    )
    require(tuple(scales.shape) == (codes.shape[0],) and scales.dtype == torch.float32, f"scales {tuple(scales.shape)}")
    require(tuple(x.scales.shape) == (num_rows,) and x.scales.dtype == torch.float32, "x has no scale a row")
    require(bias is None or (bias.shape == (n,) and not fused), "bias is not [N], or a fused product has one")
    for tensor in (*x, codes, scales, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    tiles_m, tiles_n = cdiv(num_rows, 64 * CONSUMERS), cdiv(n, HALF if fused else 2 * HALF)
    _product_8bit_kernel[(min(num_sms, tiles_m * tiles_n),)](
        boxes(x.codes, 64, STEP), boxes(codes, HALF, STEP),
        boxes(out, 64, HALF), x.scales, scales, scales if bias is None else bias, tiles_m, tiles_n,
        n if fused else HALF, num_rows, n, k, FUSED=fused, BIAS=bias is not None, HALF=HALF, STEP=STEP, STAGES=STAGES,
        CONSUMERS=CONSUMERS, GROUP_M=GROUP_M, num_warps=4,
    )  # fmt: skip
