"""silu(x gate^T) * x up^T of many rows on Hopper, in Gluon: the wide product never reaches memory.

x is [M, K]; W is [gate; up] of [2 N, K] as in `models.weights`, y is [M, N]. One program a multiprocessor takes tile
after tile. One warp loads (TMA) into a ring of stages of 64 columns of K; each of two warpgroups computes 64 rows of x
by HALF rows of gate and the same HALF of up side by side, so that a thread holds a gate and its up. The ring fills for
the next tile during the epilogue, whose result leaves through shared memory (TMA). Tiles go down GROUP_M tiles of x
before the next rows of W, so that the L2 cache serves what runs at the same time. K is summed in steps of 16.

From about a thousand rows on it is 4 to 12 % ahead of cuBLAS with `silu_and_mul` behind it, and not below
(docs/benchmarks/kernels.md): `linear_policy.gated_by_gluon` says when to take it. Without the epilogue it is level with
cuBLAS, so it has no such mode. Tried and no better: one warpgroup some stages ahead of the other, tiles of 64 + 64 rows
of W in six stages, other GROUP_M.

bfloat16, sums in float32. Any M; N and K multiples of 8 and 64. Gluon is experimental: `prefill_gluon.is_available`.
Bytes: W, x and y once each at best.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from baton.kernels.triton.gluon_boxes import boxes
from baton.kernels.triton.launch import cdiv, require

STEP = 64  # columns of K a stage: one swizzle of 128 bytes
CONSUMERS = 2  # three would leave a thread too few registers for a product of 64 x 256
HALF, STAGES, GROUP_M = 128, 4, 16


@gluon.jit
def place(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Tile number -> (row, column) of tiles."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    within = tile % (GROUP_M * tiles_n)
    size_m = gl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + within % size_m, within // size_m


@gluon.jit
def sum_of_ring(
    sums, step, x_tiles, weight_tiles, full, empty, k_size, STEP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """sums plus the product of one tile, whose stages come through the ring from number `step` on, and the number
    behind them. A stage is free again when the product after it is issued."""
    for k in range(0, k_size, STEP):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        flying = warpgroup_mma(
            x_tiles.index(stage * CONSUMERS + GROUP), weight_tiles.index(stage).permute((1, 0)), sums, is_async=True
        )
        sums = warpgroup_mma_wait(1, deps=[flying])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return sums, step


@gluon.jit
def _producer(
    x_desc, weight_desc, x_tiles, weight_tiles, full, empty, tiles_m, tiles_n, n, k_size, HALF: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, STEP], gl.bfloat16)
    halves = weight_tiles._reinterpret(gl.bfloat16, [STAGES * 2, HALF, STEP], half_layout)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        first_m = tile_m * (64 * CONSUMERS)
        first_n = tile_n * HALF
        for k in range(0, k_size, STEP):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (64 * CONSUMERS + 2 * HALF) * STEP * 2)
            for i in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    x_desc, [first_m + 64 * i, k], bar, x_tiles.index(stage * CONSUMERS + i)
                )
            tma.async_copy_global_to_shared(weight_desc, [first_n, k], bar, halves.index(stage * 2))
            tma.async_copy_global_to_shared(weight_desc, [n + first_n, k], bar, halves.index(stage * 2 + 1))
            step += 1


@gluon.jit
def silu(gate):
    """gate / (1 + exp(-gate)) in five instructions: the general ones take care of denormals, which do not matter."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }",
        "=f,f",
        [gate],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _consumer(
    out_desc, x_tiles, weight_tiles, out_tiles, full, empty, tiles_m, tiles_n, k_size, HALF: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * HALF, 16])
    HALVES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    out_tile = out_tiles.index(GROUP)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        sums = gl.zeros([64, 2 * HALF], gl.float32, layout=SUMS)
        sums, step = sum_of_ring(
            sums, step, x_tiles, weight_tiles, full, empty, k_size, STEP, STAGES, CONSUMERS, GROUP
        )  # fmt: skip
        gate, up = sums.reshape([64, 2, HALF]).permute(0, 2, 1).split()
        gate = gl.convert_layout(gate, HALVES, assert_trivial=True)
        up = gl.convert_layout(up, HALVES, assert_trivial=True)
        tma.store_wait(0)  # until the tile before has left out_tile
        out_tile.store((silu(gate) * up).to(gl.bfloat16))
        fence_async_shared()
        row = tile_m * (64 * CONSUMERS) + 64 * GROUP
        tma.async_copy_shared_to_global(out_desc, [row, tile_n * HALF], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "n", "k_size"])
def _gated_product_kernel(
    x_desc, weight_desc, out_desc, tiles_m, tiles_n, n, k_size, HALF: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP_M: gl.constexpr,
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
                    out_desc, x_tiles, weight_tiles, out_tiles, full, empty, tiles_m, tiles_n, k_size, HALF, STEP,
                    STAGES, CONSUMERS, GROUP_M, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, x_tiles, weight_tiles, out_tiles, full, empty, tiles_m, tiles_n, k_size, HALF, STEP,
                    STAGES, CONSUMERS, GROUP_M, 1,
                ),
            ),
            (
                _producer,
                (
                    x_desc, weight_desc, x_tiles, weight_tiles, full, empty, tiles_m, tiles_n, n, k_size, HALF, STEP,
                    STAGES, CONSUMERS, GROUP_M,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def gated_product(x: torch.Tensor, weight: torch.Tensor, num_sms: int, out: torch.Tensor) -> None:
    """Fills out [M, N]; x [M, K], weight [2 N, K]; all bfloat16 and contiguous."""
    (num_rows, k), n = x.shape, weight.shape[0] // 2
    require(tuple(weight.shape) == (2 * n, k) and tuple(out.shape) == (num_rows, n), f"out {tuple(out.shape)}")
    require(n % 8 == 0 and k % STEP == 0, f"a product of {k} inputs and {n} outputs")
    require(x.dtype == weight.dtype == out.dtype == torch.bfloat16, "x, weight and out must be bfloat16")
    require(k >= STAGES * STEP, f"{k} inputs are fewer than {STAGES} stages hold")
    for tensor in (x, weight, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    tiles_m, tiles_n = cdiv(num_rows, 64 * CONSUMERS), cdiv(n, HALF)
    _gated_product_kernel[(min(num_sms, tiles_m * tiles_n),)](
        boxes(x, 64, STEP), boxes(weight, HALF, STEP), boxes(out, 64, HALF), tiles_m, tiles_n, n, k,
        HALF=HALF, STEP=STEP, STAGES=STAGES, CONSUMERS=CONSUMERS, GROUP_M=GROUP_M, num_warps=4,
    )  # fmt: skip
