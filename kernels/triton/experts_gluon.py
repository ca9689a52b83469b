"""Products of experts with many rows on Hopper, in Gluon: tiles of 128 rows of x, each of one expert.

x [P, K] lies in the order of `route`, with tile_m 128; W is [E * N, K], expert e from row e * N on, and y [P, N]. As
`product_gluon`, whose loader and ring these are: only which rows of W a tile takes is read on the device, as is how
many tiles there are. Tiles go down GROUP_M tiles of x, hence a few experts, before the next rows of W.
gated: W_e is [gate; up] of [2 N, K], and y = silu(gate) * up; a thread holds a gate and its up. Else a warpgroup
computes 64 rows by 2 * HALF outputs, which leave in halves. Columns past N are those of the next expert, and are cut
off when they are stored. K is summed in steps of 16, so a row's bits depend on that row alone.

bfloat16, sums in float32. N and K multiples of 8 and 64. Gluon is experimental: `prefill_gluon.is_available`.
Bytes: W of the experts that were chosen, x and y once each at best.
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
from baton.kernels.triton.product_gluon import place, silu, sum_of_ring
from baton.kernels.triton.route import Routes

STEP = 64  # columns of K a stage: one swizzle of 128 bytes
CONSUMERS = 2  # warpgroups, of 64 rows each
TILE_M = 64 * CONSUMERS
HALF, STAGES, GROUP_M = 128, 4, 16


@gluon.jit
def _producer(
    x_desc, weight_desc, experts_ptr, num_tiles_ptr, x_tiles, weight_tiles, full, empty, tiles_n, n, k_size,
    GATED: gl.constexpr, HALF: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, STEP], gl.bfloat16)
    halves = weight_tiles._reinterpret(gl.bfloat16, [STAGES * 2, HALF, STEP], half_layout)
    tiles_m = gl.load(num_tiles_ptr)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        first_m = tile_m * (64 * CONSUMERS)
        expert = gl.load(experts_ptr + tile_m)
        if GATED:
            first = expert * 2 * n + tile_n * HALF
            second = first + n
        else:
            first = expert * n + tile_n * 2 * HALF
            second = first + HALF
        for k in range(0, k_size, STEP):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (64 * CONSUMERS + 2 * HALF) * STEP * 2)
            for i in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    x_desc, [first_m + 64 * i, k], bar, x_tiles.index(stage * CONSUMERS + i)
                )
            tma.async_copy_global_to_shared(weight_desc, [first, k], bar, halves.index(stage * 2))
            tma.async_copy_global_to_shared(weight_desc, [second, k], bar, halves.index(stage * 2 + 1))
            step += 1


@gluon.jit
def _consumer(
    out_desc, num_tiles_ptr, x_tiles, weight_tiles, out_tiles, full, empty, tiles_n, k_size, GATED: gl.constexpr,
    HALF: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * HALF, 16])
    HALVES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    out_tile = out_tiles.index(GROUP)
    tiles_m = gl.load(num_tiles_ptr)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        sums = gl.zeros([64, 2 * HALF], gl.float32, layout=SUMS)
        sums, step = sum_of_ring(
            sums, step, x_tiles, weight_tiles, full, empty, k_size, STEP, STAGES, CONSUMERS, GROUP
        )  # fmt: skip
        left, right = sums.reshape([64, 2, HALF]).permute(0, 2, 1).split()
        left = gl.convert_layout(left, HALVES, assert_trivial=True)
        right = gl.convert_layout(right, HALVES, assert_trivial=True)
        row = tile_m * (64 * CONSUMERS) + 64 * GROUP
        tma.store_wait(0)  # until the tile before has left out_tile
        if GATED:
            out_tile.store((silu(left) * right).to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, tile_n * HALF], out_tile)
        else:
            out_tile.store(left.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, tile_n * 2 * HALF], out_tile)
            tma.store_wait(0)
            out_tile.store(right.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, tile_n * 2 * HALF + HALF], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_n", "n", "k_size"])
def _experts_product_kernel(
    x_desc, weight_desc, out_desc, experts_ptr, num_tiles_ptr, tiles_n, n, k_size, GATED: gl.constexpr,
    HALF: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, STEP], gl.bfloat16)
    weight_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * HALF, STEP], gl.bfloat16)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HALF], gl.bfloat16)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES * CONSUMERS, 64, STEP], x_layout)
    weight_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * HALF, STEP], weight_layout)
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
                    out_desc, num_tiles_ptr, x_tiles, weight_tiles, out_tiles, full, empty, tiles_n, k_size, GATED,
                    HALF, STEP, STAGES, CONSUMERS, GROUP_M, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, num_tiles_ptr, x_tiles, weight_tiles, out_tiles, full, empty, tiles_n, k_size, GATED,
                    HALF, STEP, STAGES, CONSUMERS, GROUP_M, 1,
                ),
            ),
            (
                _producer,
                (
                    x_desc, weight_desc, experts_ptr, num_tiles_ptr, x_tiles, weight_tiles, full, empty, tiles_n, n,
                    k_size, GATED, HALF, STEP, STAGES, CONSUMERS, GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def experts_product(
    x: torch.Tensor, weight: torch.Tensor, routes: Routes, num_sms: int, out: torch.Tensor, *, gated: bool
) -> None:
    """Fills the rows of out [P, N] that some token has; x [P, K], P = most_tiles * TILE_M; weight [E, N, K], when gated
    [E, 2 N, K]; all bfloat16 and contiguous."""
    k, n = weight.shape[2], weight.shape[1] // (2 if gated else 1)
    num_rows = routes.most_tiles * TILE_M
    require(routes.tile_m == TILE_M, f"tiles of {routes.tile_m} rows, not {TILE_M}")
    require(tuple(x.shape) == (num_rows, k) and tuple(out.shape) == (num_rows, n), f"x {tuple(x.shape)}")
    require(n % 8 == 0 and k % STEP == 0, f"a product of {k} inputs and {n} outputs")
    require(x.dtype == weight.dtype == out.dtype == torch.bfloat16, "x, weight and out must be bfloat16")
    require(k >= STAGES * STEP, f"{k} inputs are fewer than {STAGES} stages hold")
    for tensor in (x, weight, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    tiles_n = cdiv(n, HALF if gated else 2 * HALF)
    _experts_product_kernel[(min(num_sms, routes.most_tiles * tiles_n),)](
        boxes(x, 64, STEP), boxes(weight.view(-1, k), HALF, STEP), boxes(out, 64, HALF),
        routes.experts, routes.num_tiles, tiles_n, n, k, GATED=gated, HALF=HALF, STEP=STEP, STAGES=STAGES,
        CONSUMERS=CONSUMERS, GROUP_M=GROUP_M, num_warps=4,
    )  # fmt: skip
