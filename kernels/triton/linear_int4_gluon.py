"""The product of linear_int4 on Hopper, in Gluon: the same numbers for fewer rows of x, at more bytes a second.

What linear_int4 lacks is overlap: its warps wait for one another at every block. Here one warp loads blocks (TMA) into
a ring, and CONSUMERS warpgroups take block after block in turn, each with sums of its own, which meet in shared memory
at the end of a unit. A unit is two tiles of 64 rows of W (gate and up if fused), for a part of K; a program takes unit
after unit, and the ring fills for the next during the epilogue. With pdl the ring fills with W before the kernel before
has ended, and only x waits for it.

bfloat16. K is summed by each warpgroup in the order of its blocks, then over warpgroups: with one number of splits and
of consumers a row's bits are the same for every M. Gluon is experimental: `prefill_gluon.is_available`.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baton.kernels.linear.grouped import CODES_PER_WORD, GroupedLinear
from baton.kernels.triton.launch import require
from baton.kernels.triton.linear_int4 import unpacking
from baton.kernels.triton.linear_policy import Tiles

ROWS = 64  # of W a tile


@gluon.jit
def _place(unit, tiles_n, SPLITS: gl.constexpr):
    """Unit -> (tile of x, tile of W, split)."""
    return unit // (tiles_n * SPLITS), unit // SPLITS % tiles_n, unit % SPLITS


@gluon.jit
def _prefetch_scales(ptr, first_row, second_row, first_group, n, GROUPS: gl.constexpr):
    """Asks the L2 cache for a line of each group of a unit."""
    LINES: gl.constexpr = 128
    line = gl.arange(0, LINES, layout=gl.BlockedLayout([LINES // 32], [32], [1], [0]))
    group = gl.minimum(line // 2, GROUPS - 1)
    address = (ptr + (first_group + group) * n + gl.where(line % 2 == 0, first_row, second_row)).to(gl.int64)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _producer(
    x_desc, words_desc, scales_ptr, zeros_ptr, words, x_tiles, full, empty, units, tiles_n, all_rows,
    second: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, ZEROS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (2 * 64 + 4 * TILE_M) * WIDTH * 2
    first_unit, programs = gl.program_id(0), gl.num_programs(0)
    total = (units - first_unit + programs - 1) // programs * BLOCKS
    ahead = gl.minimum(total, STAGES)
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    for step in range(0, ahead):
        tile_m, tile_n, split = _place(first_unit + step // BLOCKS * programs, tiles_n, SPLITS)
        block = split * BLOCKS + step % BLOCKS
        mbarrier.expect(full.index(step), BYTES)
        row, column = tile_n * TILE_N, block * WIDTH
        tma.async_copy_global_to_shared(words_desc, [row, column], full.index(step), words.index(step * 2))
        tma.async_copy_global_to_shared(words_desc, [row + second, column], full.index(step), words.index(step * 2 + 1))
        if step % BLOCKS == 0:
            first_group = block * (4 * WIDTH) // GROUP
            _prefetch_scales(scales_ptr, row, row + second, first_group, all_rows, BLOCKS * 4 * WIDTH // GROUP)
            if ZEROS:
                _prefetch_scales(zeros_ptr, row, row + second, first_group, all_rows, BLOCKS * 4 * WIDTH // GROUP)
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for step in range(0, ahead):
        tile_m, tile_n, split = _place(first_unit + step // BLOCKS * programs, tiles_n, SPLITS)
        k = (split * BLOCKS + step % BLOCKS) * (4 * WIDTH)
        for place in gl.static_range(4):
            tma.async_copy_global_to_shared(
                x_desc, [tile_m * TILE_M, k + place * WIDTH], full.index(step), x_tiles.index(step * 4 + place)
            )
    for step in range(ahead, total):
        tile_m, tile_n, split = _place(first_unit + step // BLOCKS * programs, tiles_n, SPLITS)
        block, stage = split * BLOCKS + step % BLOCKS, step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        row, column = tile_n * TILE_N, block * WIDTH
        tma.async_copy_global_to_shared(words_desc, [row, column], bar, words.index(stage * 2))
        tma.async_copy_global_to_shared(words_desc, [row + second, column], bar, words.index(stage * 2 + 1))
        for place in gl.static_range(4):
            tma.async_copy_global_to_shared(
                x_desc, [tile_m * TILE_M, block * (4 * WIDTH) + place * WIDTH], bar, x_tiles.index(stage * 4 + place)
            )
        if step % BLOCKS == 0:
            first_group = block * (4 * WIDTH) // GROUP
            _prefetch_scales(scales_ptr, row, row + second, first_group, all_rows, BLOCKS * 4 * WIDTH // GROUP)
            if ZEROS:
                _prefetch_scales(zeros_ptr, row, row + second, first_group, all_rows, BLOCKS * 4 * WIDTH // GROUP)


@gluon.jit
def _codes(words, minus_zero, PLACE: gl.constexpr):
    """As linear_int4's."""
    return gl.inline_asm_elementwise(
        unpacking(PLACE), "=r,r,r", [words, minus_zero], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _minus_zero(zeros_ptr, of_group, WIDTH: gl.constexpr, ZEROS: gl.constexpr, OPERAND: gl.constexpr):
    if ZEROS:
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, OPERAND))
        bits = gl.load(zeros_ptr + of_group + row).to(gl.int16) - 0x3D00
        return gl.expand_dims(bits.to(gl.bfloat16, bitcast=True), 1).broadcast_to([64, WIDTH])
    else:
        return gl.full([64, WIDTH], -136.0, gl.float32, layout=OPERAND).to(gl.bfloat16)


@gluon.jit
def _consumer(
    scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free, units, tiles_n, all_rows,
    num_rows, second: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
    SPLITS: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, ZEROS: gl.constexpr,
    FUSED: gl.constexpr, BIAS: gl.constexpr, CONSUMERS: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    PARTS: gl.constexpr = 4 * WIDTH // GROUP if 4 * WIDTH > GROUP else 1  # groups of a block
    PLACES: gl.constexpr = 4 // PARTS
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    m = gl.arange(0, TILE_M, layout=gl.SliceLayout(0, SUMS))
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        number = (unit - gl.program_id(0)) // gl.num_programs(0)
        tile_m, tile_n, split = _place(unit, tiles_n, SPLITS)
        first_row = tile_n * TILE_N
        first = gl.zeros([64, TILE_M], gl.float32, layout=SUMS)
        other = gl.zeros([64, TILE_M], gl.float32, layout=SUMS)
        for block in range(INDEX, BLOCKS, CONSUMERS):
            step = number * BLOCKS + block
            stage = step % STAGES
            group = (split * BLOCKS + block) * (4 * WIDTH) // GROUP
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            first_words = words.index(stage * 2).load(OPERAND)
            other_words = words.index(stage * 2 + 1).load(OPERAND)
            for part in gl.static_range(PARTS):
                of_group = (group + part) * all_rows + first_row
                scale = gl.load(scales_ptr + of_group + row).to(gl.float32)
                other_scale = gl.load(scales_ptr + of_group + second + row).to(gl.float32)
                minus_zero = _minus_zero(zeros_ptr, of_group, WIDTH, ZEROS, OPERAND)
                sums = gl.zeros([64, TILE_M], gl.float32, layout=SUMS)
                for place in gl.static_range(part * PLACES, (part + 1) * PLACES):
                    x = x_tiles.index(stage * 4 + place).permute((1, 0))
                    sums = warpgroup_mma(_codes(first_words, minus_zero, place), x, sums, is_async=True)
                minus_zero = _minus_zero(zeros_ptr, of_group + second, WIDTH, ZEROS, OPERAND)
                other_sums = gl.zeros([64, TILE_M], gl.float32, layout=SUMS)
                for place in gl.static_range(part * PLACES, (part + 1) * PLACES):
                    x = x_tiles.index(stage * 4 + place).permute((1, 0))
                    other_sums = warpgroup_mma(_codes(other_words, minus_zero, place), x, other_sums, is_async=True)
                sums = warpgroup_mma_wait(PLACES, deps=[sums])
                first += sums * gl.expand_dims(scale, 1)
                other_sums = warpgroup_mma_wait(0, deps=[other_sums])
                other += other_sums * gl.expand_dims(other_scale, 1)
            mbarrier.arrive(empty.index(stage), count=1)
        if INDEX > 0:
            mbarrier.wait(free, (number & 1) ^ 1)
            parts.index((INDEX - 1) * 2).store(first)
            parts.index((INDEX - 1) * 2 + 1).store(other)
            mbarrier.arrive(done, count=1)
        else:
            mbarrier.wait(done, number & 1)
            for index in gl.static_range(CONSUMERS - 1):
                first += parts.index(index * 2).load(SUMS)
                other += parts.index(index * 2 + 1).load(SUMS)
            mbarrier.arrive(free, count=1)
            _store(
                first, other, bias_ptr, out_ptr, first_row, second, tile_m * TILE_M, split, tiles_n * TILE_N, num_rows,
                row, m, FUSED, BIAS,
            )  # fmt: skip


@gluon.jit
def _store(
    first, other, bias_ptr, out_ptr, first_row, second: gl.constexpr, first_m, split, n, num_rows, row, m,
    FUSED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    m = first_m + m
    inside = gl.expand_dims(m < num_rows, 0)
    place = (
        split.to(gl.int64) * num_rows * n + gl.expand_dims(m, 0).to(gl.int64) * n + gl.expand_dims(first_row + row, 1)
    )
    if FUSED:
        gated = first / (1.0 + gl.exp(-first)) * other
        gl.store(out_ptr + place, gated.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        if BIAS:  # noqa: SIM102 - known when compiling, the next one is not
            if split == 0:
                first += gl.expand_dims(gl.load(bias_ptr + first_row + row).to(gl.float32), 1)
                other += gl.expand_dims(gl.load(bias_ptr + first_row + second + row).to(gl.float32), 1)
        gl.store(out_ptr + place, first.to(out_ptr.dtype.element_ty), mask=inside)
        gl.store(out_ptr + place + second, other.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["units", "tiles_n", "all_rows", "num_rows"])
def _linear_int4_gluon_kernel(
    x_desc, words_desc, scales_ptr, zeros_ptr, bias_ptr, out_ptr, units, tiles_n, all_rows, num_rows,
    SECOND: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr,
    TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, ZEROS: gl.constexpr, FUSED: gl.constexpr,
    BIAS: gl.constexpr, CONSUMERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    words_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], gl.int16)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_M, WIDTH], gl.bfloat16)
    parts_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words = gl.allocate_shared_memory(gl.int16, [STAGES * 2, 64, WIDTH], words_layout)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, TILE_M, WIDTH], x_layout)
    parts = gl.allocate_shared_memory(gl.float32, [(CONSUMERS - 1) * 2, 64, TILE_M], parts_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ending = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    done, free = ending.index(0), ending.index(1)
    mbarrier.init(done, count=CONSUMERS - 1)
    mbarrier.init(free, count=1)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_n, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 0,
                    ),
                ),
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_n, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 1,
                    ),
                ),
                (
                    _producer,
                    (
                        x_desc, words_desc, scales_ptr, zeros_ptr, words, x_tiles, full, empty, units, tiles_n,
                        all_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N, STAGES, ZEROS, PDL,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_n, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 0,
                    ),
                ),
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_n, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 1,
                    ),
                ),
                (
                    _consumer,
                    (
                        scales_ptr, zeros_ptr, bias_ptr, out_ptr, words, x_tiles, full, empty, parts, done, free,
                        units, tiles_n, all_rows, num_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N,
                        STAGES, ZEROS, FUSED, BIAS, CONSUMERS, 2,
                    ),
                ),
                (
                    _producer,
                    (
                        x_desc, words_desc, scales_ptr, zeros_ptr, words, x_tiles, full, empty, units, tiles_n,
                        all_rows, SECOND, BLOCKS, WIDTH, GROUP, SPLITS, TILE_M, TILE_N, STAGES, ZEROS, PDL,
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
    tile_n = ROWS if fused else 2 * ROWS
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(x.dtype == torch.bfloat16, "x must be bfloat16")
    require(weight.num_inputs == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(tiles.tile_k == block and tiles.tile_n == tile_n, f"{tiles} are not of {tile_n} x {block}")
    require(n % tile_n == 0 and k % (tiles.splits * block) == 0, f"{tiles} do not divide [{n}, {k}]")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    for tensor in (x, weight.words, weight.scales, weight.zeros, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    width = block // CODES_PER_WORD
    tiles_n = n // tile_n
    units = triton.cdiv(num_rows, tiles.tile_m) * tiles_n * tiles.splits
    zeros = weight.scales if weight.zeros is None else weight.zeros
    options = {"launch_pdl": True} if pdl else {}
    _linear_int4_gluon_kernel[(min(num_sms, units),)](
        _descriptor(x, tiles.tile_m, width, gl.bfloat16), _descriptor(weight.words, ROWS, width, gl.int16),
        weight.scales, zeros, weight.words if bias is None else bias, out, units, tiles_n, weight.num_outputs, num_rows,
        SECOND=n if fused else ROWS, BLOCKS=k // block // tiles.splits, WIDTH=width, GROUP=weight.inputs_per_scale,
        SPLITS=tiles.splits, TILE_M=tiles.tile_m, TILE_N=tile_n, STAGES=tiles.stages, ZEROS=weight.zeros is not None,
        FUSED=fused, BIAS=bias is not None, CONSUMERS=tiles.warps // 4, PDL=pdl, num_warps=4, **options,
    )  # fmt: skip


def _descriptor(matrix: torch.Tensor, rows: int, columns: int, dtype: gl.dtype) -> TensorDescriptor:
    box = [rows, columns]
    return TensorDescriptor.from_tensor(matrix, box, gl.NVMMASharedLayout.get_default_for(box, dtype))
