"""The ring of shared memory through which W and x reach the products of few rows on Hopper, in Gluon.

One warp fills it by TMA, groups of four warps take stage after stage in turn. A stage is two tiles of 64 rows of W
(gate and up if fused), and beside them PLACES tiles of x, of one block of inputs. A unit is such a pair of tiles for a
part of K; a program takes unit after unit, and the ring fills for the next while one is stored. With PDL it fills with
W before the kernel before has ended, and only x waits for that.
"""
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS: gl.constexpr = gl.constexpr(64)  # of W a tile


@gluon.jit
def place_of_unit(unit, tiles_m, SPLITS: gl.constexpr):
    """Unit -> (tile of x, tile of W, split). Tiles of x that read one tile of W run at the same time."""
    return unit % tiles_m, unit // (tiles_m * SPLITS), unit // tiles_m % SPLITS


@gluon.jit
def make_barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Of each stage: full, empty. Of the sums of groups of warps other than the first: done, free.

    A barrier has two phases: a group that came to a stage before what another group had there in the unit before has
    arrived would find it full. So where blocks of a unit are no multiple of the groups, stages go from one to another,
    and a stage may be in two units that follow one another, a group waits for `free` before a unit and not before it
    leaves its sums."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ending = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(ending.index(0), count=GROUPS - 1 if GROUPS > 1 else 1)
    mbarrier.init(ending.index(1), count=1)
    return full, empty, ending.index(0), ending.index(1)


@gluon.jit
def _prefetch_scales(ptr, first_row, second_row, first_group, n, GROUPS: gl.constexpr):
    """Asks the L2 cache for a line of each group of a unit."""
    LINES: gl.constexpr = 128
    line = gl.arange(0, LINES, layout=gl.BlockedLayout([LINES // 32], [32], [1], [0]))
    row = gl.where(line % 2 == 0, first_row, second_row)
    for first in range(0, GROUPS, LINES // 2):
        group = gl.minimum(first + line // 2, GROUPS - 1)
        address = (ptr + (first_group + group) * n + row).to(gl.int64)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _ask_for_weights(
    weight_desc, scales_ptr, zeros_ptr, weights, bar, stage, block, step, row, all_rows, second: gl.constexpr,
    BLOCKS: gl.constexpr, INPUTS: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    tma.async_copy_global_to_shared(weight_desc, [row, block * WIDTH], bar, weights.index(stage * 2))
    tma.async_copy_global_to_shared(weight_desc, [row + second, block * WIDTH], bar, weights.index(stage * 2 + 1))
    if GROUP > 0:  # noqa: SIM102 - known when compiling, the next one is not
        if step % BLOCKS == 0:
            first_group = block * INPUTS // GROUP
            _prefetch_scales(scales_ptr, row, row + second, first_group, all_rows, BLOCKS * INPUTS // GROUP)
            if ZEROS:
                _prefetch_scales(zeros_ptr, row, row + second, first_group, all_rows, BLOCKS * INPUTS // GROUP)


@gluon.jit
def fill_ring(
    x_desc, weight_desc, scales_ptr, zeros_ptr, weights, x_tiles, full, empty, units, tiles_m, all_rows,
    second: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr, PLACES: gl.constexpr, GROUP: gl.constexpr,
    SPLITS: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, STAGES: gl.constexpr, ZEROS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """weights [2 * STAGES, 64, WIDTH], x_tiles [PLACES * STAGES, TILE_M, WIDTH]; a block is PLACES * WIDTH inputs of x.
    GROUP: inputs that share a scale, and with ZEROS a zero point, which the L2 cache is asked for; 0: of none."""
    INPUTS: gl.constexpr = PLACES * WIDTH
    BYTES: gl.constexpr = (2 * ROWS + PLACES * TILE_M) * WIDTH * (weight_desc.dtype.primitive_bitwidth // 8)
    first_unit, programs = gl.program_id(0), gl.num_programs(0)
    total = (units - first_unit + programs - 1) // programs * BLOCKS
    ahead = gl.minimum(total, STAGES)
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    for step in range(0, ahead):
        tile_m, tile_n, split = place_of_unit(first_unit + step // BLOCKS * programs, tiles_m, SPLITS)
        mbarrier.expect(full.index(step), BYTES)
        _ask_for_weights(
            weight_desc, scales_ptr, zeros_ptr, weights, full.index(step), step, split * BLOCKS + step % BLOCKS, step,
            tile_n * TILE_N, all_rows, second, BLOCKS, INPUTS, WIDTH, GROUP, ZEROS,
        )  # fmt: skip
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    for step in range(0, ahead):
        tile_m, tile_n, split = place_of_unit(first_unit + step // BLOCKS * programs, tiles_m, SPLITS)
        k = (split * BLOCKS + step % BLOCKS) * INPUTS
        for place in gl.static_range(PLACES):
            tma.async_copy_global_to_shared(
                x_desc, [tile_m * TILE_M, k + place * WIDTH], full.index(step), x_tiles.index(step * PLACES + place)
            )
    for step in range(ahead, total):
        tile_m, tile_n, split = place_of_unit(first_unit + step // BLOCKS * programs, tiles_m, SPLITS)
        block, stage = split * BLOCKS + step % BLOCKS, step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        _ask_for_weights(
            weight_desc, scales_ptr, zeros_ptr, weights, bar, stage, block, step, tile_n * TILE_N, all_rows, second,
            BLOCKS, INPUTS, WIDTH, GROUP, ZEROS,
        )  # fmt: skip
        for place in gl.static_range(PLACES):
            tma.async_copy_global_to_shared(
                x_desc, [tile_m * TILE_M, block * INPUTS + place * WIDTH], bar, x_tiles.index(stage * PLACES + place)
            )


@gluon.jit
def store_unit(
    total, out_ptr, first_row, first_m, split, n, num_rows, TILE_M: gl.constexpr, FUSED: gl.constexpr,
    SUMS: gl.constexpr,
):  # fmt: skip
    if FUSED:
        gate, up = gl.reshape(total, [2, ROWS, TILE_M]).permute(1, 2, 0).split()
        gate = gl.convert_layout(gate, SUMS, assert_trivial=True)
        up = gl.convert_layout(up, SUMS, assert_trivial=True)
        result = gate / (1.0 + gl.exp(-gate)) * up
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    else:
        result = total
        row = first_row + gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(1, SUMS))
    m = first_m + gl.arange(0, TILE_M, layout=gl.SliceLayout(0, SUMS))
    place = gl.expand_dims(split.to(gl.int64) * num_rows * n + m.to(gl.int64) * n, 0) + gl.expand_dims(row, 1)
    gl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(m < num_rows, 0))
