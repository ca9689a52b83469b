"""The product of linear_8bit on Hopper, in Gluon: the same sums of 128 inputs, nearer to the speed of memory.

One warp loads blocks of 128 inputs (TMA) into a ring, one or two groups of four warps take them in turn and multiply
bytes by bytes, both from shared memory. A unit is two tiles of 64 rows of W (gate and up if fused), for a part of K; a
program takes unit after unit, and the ring fills for the next during the epilogue. With pdl the ring fills with W
before the kernel before has ended, and only x waits for it: the memory is busy while norms and attention are not.

FP8's sums of a block are added in float32, by each group in the order of its blocks, then over both; INT8's with scales
of rows are exact. So with one number of splits and of groups a row's bits are the same for every M. Gluon is
experimental: `prefill_gluon.is_available`.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from baton.kernels.triton.gluon_boxes import boxes
from baton.kernels.triton.launch import cdiv, require
from baton.kernels.triton.linear_8bit import BLOCK
from baton.kernels.triton.linear_8bit_policy import programs_that_fit
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.quantise import RUN, CodedRows
from baton.kernels.triton.weight_ring import ROWS, fill_ring, make_barriers, place_of_unit, store_unit

WIDTH: gl.constexpr = gl.constexpr(BLOCK)  # inputs a stage


@gluon.jit
def _of_x(place, inside):
    """From the L2 cache: the kernel before wrote it, perhaps while this one began."""
    return gl.load(place, mask=inside, other=0.0, cache_modifier=".cg")


@gluon.jit
def _consumer(
    x_scale_ptr, scale_ptr, bias_ptr, out_ptr, codes, x_tiles, full, empty, parts, done, free, units, tiles_m,
    all_rows, num_rows, scale_stride, SECOND: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, BLOCKED: gl.constexpr, RUNS: gl.constexpr,
    FUSED: gl.constexpr, BIAS: gl.constexpr, GROUPS: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M, 32])
    STAGES_CHANGE: gl.constexpr = BLOCKS % GROUPS != 0 and STAGES < 2 * BLOCKS  # see make_barriers
    EXACT: gl.constexpr = codes.dtype == gl.int8 and not (BLOCKED or RUNS)
    SUM_TYPE: gl.constexpr = gl.int32 if codes.dtype == gl.int8 else gl.float32
    pair_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * ROWS, WIDTH], codes.dtype)
    pairs = codes._reinterpret(codes.dtype, [STAGES, 2 * ROWS, WIDTH], pair_layout)
    row = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, SUMS))
    row = gl.where(row < ROWS, row, row - ROWS + SECOND)
    column = gl.arange(0, TILE_M, layout=gl.SliceLayout(0, SUMS))
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        number = (unit - gl.program_id(0)) // gl.num_programs(0)
        if INDEX > 0 and STAGES_CHANGE:
            mbarrier.wait(free, (number & 1) ^ 1)
        tile_m, tile_n, split = place_of_unit(unit, tiles_m, SPLITS)
        first_row, of_x = tile_n * TILE_N, tile_m * TILE_M + column
        inside = of_x < num_rows
        first_step, first_block = number * BLOCKS, split * BLOCKS
        of_row = (first_row + row) // WIDTH * (BLOCKS * SPLITS)
        next_block = first_block + INDEX
        if BLOCKED:
            next_of_row = gl.load(scale_ptr + of_row + next_block)
        if RUNS:
            own = first_step + INDEX  # of another group's stage the phase may be the next but one
            mbarrier.wait(full.index(own % STAGES), (own // STAGES) & 1)  # x and its scales are there
            next_of_x = _of_x(x_scale_ptr + next_block * scale_stride + of_x, inside)
        total = gl.zeros([2 * ROWS, TILE_M], gl.int32 if EXACT else gl.float32, layout=SUMS)
        sums = gl.zeros([2 * ROWS, TILE_M], SUM_TYPE, layout=SUMS)
        for block in range(INDEX, BLOCKS, GROUPS):
            step = first_step + block
            stage = step % STAGES
            next_block = first_block + gl.minimum(block + GROUPS, BLOCKS - 1)
            if BLOCKED:
                block_scale = gl.expand_dims(next_of_row, 1)
                next_of_row = gl.load(scale_ptr + of_row + next_block)
            if RUNS:
                run_scale = gl.expand_dims(next_of_x, 0)
                next_of_x = _of_x(x_scale_ptr + next_block * scale_stride + of_x, inside)
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            x = x_tiles.index(stage).permute((1, 0))
            if EXACT:
                flying = warpgroup_mma(pairs.index(stage), x, total, is_async=True)
                total = warpgroup_mma_wait(0, deps=[flying])
            else:
                flying = warpgroup_mma(pairs.index(stage), x, sums, use_acc=False, is_async=True)
                sums = warpgroup_mma_wait(0, deps=[flying])
            mbarrier.arrive(empty.index(stage), count=1)
            if BLOCKED and RUNS:
                total += sums.to(gl.float32) * (run_scale * block_scale)
            elif RUNS:
                total += sums.to(gl.float32) * run_scale
            elif BLOCKED:
                total += sums.to(gl.float32) * block_scale
            elif not EXACT:
                total += sums
        if INDEX > 0:
            if not STAGES_CHANGE:
                mbarrier.wait(free, (number & 1) ^ 1)
            parts.store(total)
            mbarrier.arrive(done, count=1)
        else:
            if not RUNS:
                row_scale = _of_x(x_scale_ptr + of_x, inside)
            if not BLOCKED:
                output_scale = gl.load(scale_ptr + first_row + row)
            if GROUPS > 1:
                mbarrier.wait(done, number & 1)
                total += parts.load(SUMS)
                mbarrier.arrive(free, count=1)
            result = total.to(gl.float32)
            if not RUNS:
                result *= gl.expand_dims(row_scale, 0)
            if not BLOCKED:
                result *= gl.expand_dims(output_scale, 1)
            if BIAS:  # noqa: SIM102 - known when compiling, the next one is not
                if split == 0:
                    result += gl.expand_dims(gl.load(bias_ptr + first_row + row).to(gl.float32), 1)
            n = all_rows // 2 if FUSED else all_rows
            store_unit(result, out_ptr, first_row, tile_m * TILE_M, split, n, num_rows, TILE_M, FUSED, SUMS)


@gluon.jit(do_not_specialize=["units", "tiles_m", "all_rows", "num_rows", "scale_stride"])
def _linear_8bit_gluon_kernel(
    x_desc, codes_desc, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, units, tiles_m, all_rows, num_rows, scale_stride,
    SECOND: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, TILE_M: gl.constexpr,
    TILE_N: gl.constexpr, STAGES: gl.constexpr, BLOCKED: gl.constexpr, RUNS: gl.constexpr, FUSED: gl.constexpr,
    BIAS: gl.constexpr, GROUPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    CODES: gl.constexpr = codes_desc.dtype
    codes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], CODES)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_M, WIDTH], CODES)
    codes = gl.allocate_shared_memory(CODES, [STAGES * 2, 64, WIDTH], codes_layout)
    x_tiles = gl.allocate_shared_memory(CODES, [STAGES, TILE_M, WIDTH], x_layout)
    PART_TYPE: gl.constexpr = gl.int32 if gl.int8 == CODES and not (BLOCKED or RUNS) else gl.float32
    parts = gl.allocate_shared_memory(
        PART_TYPE, [2 * ROWS, TILE_M if GROUPS > 1 else 1], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    full, empty, done, free = make_barriers(STAGES, GROUPS)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        x_scale_ptr, scale_ptr, bias_ptr, out_ptr, codes, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, scale_stride, SECOND, BLOCKS, SPLITS, TILE_M, TILE_N,
                        STAGES, BLOCKED, RUNS, FUSED, BIAS, GROUPS, 0,
                    ),
                ),
                (
                    _consumer,
                    (
                        x_scale_ptr, scale_ptr, bias_ptr, out_ptr, codes, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, scale_stride, SECOND, BLOCKS, SPLITS, TILE_M, TILE_N,
                        STAGES, BLOCKED, RUNS, FUSED, BIAS, GROUPS, 1,
                    ),
                ),
                (
                    fill_ring,
                    (
                        x_desc, codes_desc, scale_ptr, scale_ptr, codes, x_tiles, full, empty, units, tiles_m,
                        all_rows, SECOND, BLOCKS, WIDTH, 1, 0, SPLITS, TILE_M, TILE_N, STAGES, False, PDL,
                    ),
                ),
            ],
            [4, 1],
            [112 if TILE_M <= 32 else 216, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        x_scale_ptr, scale_ptr, bias_ptr, out_ptr, codes, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, scale_stride, SECOND, BLOCKS, SPLITS, TILE_M, TILE_N,
                        STAGES, BLOCKED, RUNS, FUSED, BIAS, GROUPS, 0,
                    ),
                ),
                (
                    fill_ring,
                    (
                        x_desc, codes_desc, scale_ptr, scale_ptr, codes, x_tiles, full, empty, units, tiles_m,
                        all_rows, SECOND, BLOCKS, WIDTH, 1, 0, SPLITS, TILE_M, TILE_N, STAGES, False, PDL,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip


def linear_8bit_gluon(
    x: CodedRows,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    num_sms: int,
    out: torch.Tensor,
    *,
    fused: bool = False,
    pdl: bool = False,
) -> None:
    """As linear_8bit; tiles.tile_n is 128 (64 if fused), tiles.tile_k 128, and no tile of x has more than 64 rows."""
    (num_rows, k), n = x.codes.shape, codes.shape[0] // (2 if fused else 1)
    blocked, runs, rows = scales.dim() == 2, x.scales.dim() == 2, ROWS.value
    tile_n = rows if fused else 2 * rows
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(codes.shape[1] == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(tiles.tile_k == BLOCK and tiles.tile_n == tile_n, f"{tiles} are not of {tile_n} x {BLOCK}")
    require(n % tile_n == 0 and k % (tiles.splits * BLOCK) == 0, f"{tiles} do not divide [{n}, {k}]")
    # A barrier has two phases: a group that waits for a stage that another group was to wait for before may be early.
    require(tiles.stages % (tiles.warps // 4) == 0, f"{tiles}: groups of warps would share stages")
    require(k // tiles.splits >= tiles.warps // 4 * BLOCK, f"{tiles} leave a group of warps nothing")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    wanted = (codes.shape[0] // BLOCK, k // BLOCK) if blocked else (codes.shape[0],)
    require(tuple(scales.shape) == wanted and scales.dtype == torch.float32, f"scales {tuple(scales.shape)}")
    require(not blocked or n % BLOCK == 0, f"{n} outputs cut through blocks")
    require(x.codes.dtype == codes.dtype and x.scales.dtype == torch.float32, "x is not in codes of W's type")
    if runs:
        require(x.scales.shape[0] * RUN == k and x.scales.shape[1] >= num_rows, f"scales of x {tuple(x.scales.shape)}")
    else:
        require(tuple(x.scales.shape) == (num_rows,), f"scales of x {tuple(x.scales.shape)}")
    for tensor in (*x, codes, scales, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    tiles_m = cdiv(num_rows, tiles.tile_m)
    units = tiles_m * (n // tile_n) * tiles.splits
    options = {"launch_pdl": True} if pdl else {}
    # Leaves room beside the kernel before, where W may wait.
    options["maxnreg"] = {4: (112, 176), 8: (88, 168)}[tiles.warps][tiles.tile_m > 32]
    _linear_8bit_gluon_kernel[(min(num_sms * programs_that_fit(tiles), units),)](
        boxes(x.codes, tiles.tile_m, BLOCK), boxes(codes, rows, BLOCK), x.scales, scales,
        scales if bias is None else bias, out, units, tiles_m, codes.shape[0], num_rows, x.scales.shape[-1],
        SECOND=n if fused else rows, BLOCKS=k // BLOCK // tiles.splits, SPLITS=tiles.splits, TILE_M=tiles.tile_m,
        TILE_N=tile_n, STAGES=tiles.stages, BLOCKED=blocked, RUNS=runs, FUSED=fused, BIAS=bias is not None,
        GROUPS=tiles.warps // 4, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
