"""The product of linear_int4 on Hopper, in Gluon: the same sums of groups, at more bytes a second.

What linear_int4 lacks is overlap: its warps wait for one another at every block. Here one warp loads blocks (TMA) into
a ring, and CONSUMERS groups of four warps take block after block in turn, each with sums of its own, which meet in
shared memory at the end of a unit. A unit is two tiles of 64 rows of W (gate and up if fused), for a part of K; a
program takes unit after unit, and the ring fills for the next during the epilogue. With pdl the ring fills with W
before the kernel before has ended, and only x waits for it.

Up to 8 rows of x are multiplied by single warps' instructions (mma.sync), more by a warpgroup's with W in registers,
which has a fixed cost of about 32 cycles. Which one is faster was measured (docs/benchmarks/kernels.md).

The integer unit has the most to do. So words are shifted once, by 8, not for each of three codes: the code in bits 4 to
7 alone is a number, code * 2**-129 in bfloat16, of which a multiplication by 2**127 makes a quarter of the code. All
become quarters, and scales are multiplied by 4: the same sums, bit for bit.

bfloat16. K is summed by each group of warps in the order of its blocks, then over these: with one number of splits and
of consumers, and tiles of 16 rows of x or more, a row's bits are the same for every M. Gluon is experimental:
`prefill_gluon.is_available`.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from baton.kernels.linear.grouped import CODES_PER_WORD, GroupedLinear
from baton.kernels.triton.gluon_boxes import boxes
from baton.kernels.triton.launch import cdiv, require
from baton.kernels.triton.linear_int4 import quarters
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.weight_ring import ROWS, fill_ring, make_barriers, place_of_unit, store_unit


@gluon.jit
def _quarters(words, minus_zeros, PLACE: gl.constexpr):
    """[2 * ROWS, W]: a quarter of the codes at this place of the words, less the zero."""
    return gl.inline_asm_elementwise(
        quarters(PLACE), "=r,r,r", [words, minus_zeros[PLACE % 2]], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _minus_zeros(zeros_ptr, place, WIDTH: gl.constexpr, ZEROS: gl.constexpr, OPERAND: gl.constexpr):
    """What is added to codes in even places, -(32 + zero / 4), and in odd ones, -zero / 4."""
    if ZEROS:
        bits = gl.load(zeros_ptr + place).to(gl.int16) - 0x3E00  # 0xC200, that is -32, and the zero
        even = gl.expand_dims(bits.to(gl.bfloat16, bitcast=True), 1).broadcast_to([2 * ROWS, WIDTH])
    else:
        even = gl.full([2 * ROWS, WIDTH], -34.0, gl.float32, layout=OPERAND).to(gl.bfloat16)
    return even, (even.to(gl.float32) + 32.0).to(gl.bfloat16)


@gluon.jit
def _consumer(
    scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free, units, tiles_m, all_rows,
    num_rows, SECOND: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
    SPLITS: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, ZEROS: gl.constexpr,
    FUSED: gl.constexpr, BIAS: gl.constexpr, CONSUMERS: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    BY_WARP: gl.constexpr = TILE_M == 8
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0] if BY_WARP else [3, 0],
        warps_per_cta=[4, 1],
        instr_shape=[16, 8] if BY_WARP else [16, TILE_M, 16],
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    X: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=SUMS, k_width=2)
    STAGES_CHANGE: gl.constexpr = BLOCKS % CONSUMERS != 0 and STAGES < 2 * BLOCKS  # see make_barriers
    PARTS: gl.constexpr = 4 * WIDTH // GROUP if 4 * WIDTH > GROUP else 1  # groups of a block
    PLACES: gl.constexpr = 4 // PARTS
    pair_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * ROWS, WIDTH], gl.int16)
    pairs = words._reinterpret(gl.int16, [STAGES, 2 * ROWS, WIDTH], pair_layout)
    row = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, SUMS))
    row = gl.where(row < ROWS, row, row - ROWS + SECOND)
    operand_row = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, OPERAND))
    operand_row = gl.where(operand_row < ROWS, operand_row, operand_row - ROWS + SECOND)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        number = (unit - gl.program_id(0)) // gl.num_programs(0)
        if INDEX > 0 and STAGES_CHANGE:
            mbarrier.wait(free, (number & 1) ^ 1)
        tile_m, tile_n, split = place_of_unit(unit, tiles_m, SPLITS)
        first_row = tile_n * TILE_N
        total = gl.zeros([2 * ROWS, TILE_M], gl.float32, layout=SUMS)
        for block in range(INDEX, BLOCKS, CONSUMERS):
            step = number * BLOCKS + block
            stage = step % STAGES
            of_block = (split * BLOCKS + block) * (4 * WIDTH) // GROUP * all_rows + first_row
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            codes = pairs.index(stage).load(OPERAND)
            for part in gl.static_range(PARTS):
                of_group = of_block + part * all_rows
                scale = gl.load(scales_ptr + of_group + row).to(gl.float32) * 4.0
                minus_zeros = _minus_zeros(zeros_ptr, of_group + operand_row, WIDTH, ZEROS, OPERAND)
                sums = gl.zeros([2 * ROWS, TILE_M], gl.float32, layout=SUMS)
                for place in gl.static_range(part * PLACES, (part + 1) * PLACES):
                    x = x_tiles.index(stage * 4 + place).permute((1, 0))
                    weights = _quarters(codes, minus_zeros, place)
                    if BY_WARP:
                        sums = mma_v2(weights, x.load(X), sums)
                    else:
                        sums = warpgroup_mma(weights, x, sums, is_async=True)
                if not BY_WARP:
                    sums = warpgroup_mma_wait(0, deps=[sums])
                total += sums * gl.expand_dims(scale, 1)
            mbarrier.arrive(empty.index(stage), count=1)
        if INDEX > 0:
            if not STAGES_CHANGE:
                mbarrier.wait(free, (number & 1) ^ 1)
            parts.index(INDEX - 1).store(total)
            mbarrier.arrive(done, count=1)
        else:
            mbarrier.wait(done, number & 1)
            for index in gl.static_range(CONSUMERS - 1):
                total += parts.index(index).load(SUMS)
            mbarrier.arrive(free, count=1)
            if BIAS:  # noqa: SIM102 - known when compiling, the next one is not
                if split == 0:
                    total += gl.expand_dims(gl.load(bias_ptr + first_row + row).to(gl.float32), 1)
            n = all_rows // 2 if FUSED else all_rows
            store_unit(total, out_ptr, first_row, tile_m * TILE_M, split, n, num_rows, TILE_M, FUSED, SUMS)


@gluon.jit(do_not_specialize=["units", "tiles_m", "all_rows", "num_rows"])
def _linear_int4_gluon_kernel(
    x_desc, words_desc, scales_ptr, zeros_ptr, bias_ptr, out_ptr, units, tiles_m, all_rows, num_rows,
    SECOND: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, ZEROS: gl.constexpr, FUSED: gl.constexpr,
    BIAS: gl.constexpr, CONSUMERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    words_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], gl.int16)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_M, WIDTH], gl.bfloat16)
    parts_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words = gl.allocate_shared_memory(gl.int16, [STAGES * 2, 64, WIDTH], words_layout)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, TILE_M, WIDTH], x_layout)
    parts = gl.allocate_shared_memory(gl.float32, [CONSUMERS - 1, 2 * ROWS, TILE_M], parts_layout)
    full, empty, done, free = make_barriers(STAGES, CONSUMERS)
    REGISTERS: gl.constexpr = 152 if TILE_M <= 16 else 240
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 0,
                    ),
                ),
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 1,
                    ),
                ),
                (
                    fill_ring,
                    (
                        x_desc, words_desc, scales_ptr, zeros_ptr, words, x_tiles, full, empty, units, tiles_m,
                        all_rows, SECOND, BLOCKS, WIDTH, 4, GROUP, SPLITS, TILE_M, TILE_N, STAGES, ZEROS, PDL,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 0,
                    ),
                ),
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 1,
                    ),
                ),
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_m, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 2,
                    ),
                ),
                (
                    fill_ring,
                    (
                        x_desc, words_desc, scales_ptr, zeros_ptr, words, x_tiles, full, empty, units, tiles_m,
                        all_rows, SECOND, BLOCKS, WIDTH, 4, GROUP, SPLITS, TILE_M, TILE_N, STAGES, ZEROS, PDL,
                    ),
                ),
            ],
            [4, 4, 1],
            [152, 152, 24],
        )  # fmt: skip


def linear_int4_gluon(
    x: torch.Tensor,
    weight: GroupedLinear,
    tiles: Tiles,
    num_sms: int,
    out: torch.Tensor,
    *,
    fused: bool = False,
    pdl: bool = False,
) -> None:
    """As linear_int4; tiles.warps counts those that compute, 8 or 12, and tiles.tile_n the rows of W of a unit."""
    (num_rows, k), block, bias = x.shape, weight.block, weight.bias
    n = weight.num_outputs // (2 if fused else 1)
    rows = ROWS.value
    tile_n = rows if fused else 2 * rows
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(x.dtype == torch.bfloat16, "x must be bfloat16")
    require(weight.num_inputs == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(tiles.tile_k == block and tiles.tile_n == tile_n, f"{tiles} are not of {tile_n} x {block}")
    require(n % tile_n == 0 and k % (tiles.splits * block) == 0, f"{tiles} do not divide [{n}, {k}]")
    # A barrier has two phases: a group that waits for a stage that another group was to wait for before may be early.
    require(tiles.stages % (tiles.warps // 4) == 0, f"{tiles}: groups of warps would share stages")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    for tensor in (x, weight.words, weight.scales, weight.zeros, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    width = block // CODES_PER_WORD
    tiles_m = cdiv(num_rows, tiles.tile_m)
    units = tiles_m * (n // tile_n) * tiles.splits
    zeros = weight.scales if weight.zeros is None else weight.zeros
    options = {"launch_pdl": True} if pdl else {}
    if tiles.warps == 8 and tiles.tile_m <= 16:  # leaves room beside the kernel before, for W to arrive meanwhile
        options["maxnreg"] = 112
    _linear_int4_gluon_kernel[(min(num_sms, units),)](
        boxes(x, tiles.tile_m, width), boxes(weight.words, rows, width),
        weight.scales, zeros, weight.words if bias is None else bias, out, units, tiles_m, weight.num_outputs, num_rows,
        SECOND=n if fused else rows, BLOCKS=k // block // tiles.splits, WIDTH=width, GROUP=weight.inputs_per_scale,
        SPLITS=tiles.splits, TILE_M=tiles.tile_m, TILE_N=tile_n, STAGES=tiles.stages, ZEROS=weight.zeros is not None,
        FUSED=fused, BIAS=bias is not None, CONSUMERS=tiles.warps // 4, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
