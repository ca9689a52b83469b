"""y = x W^T (+ b) with W of 4 bits, for the rows of a decode step, where the time is that of reading W once.

x is [M, K] bfloat16, in the order of W if that has one; W a GroupedLinear. As in `linear`, a tile of W is the large
operand of the warpgroup's matrix instruction and x the narrow one, parts of split sums are left to the reader, and gate
and up meet in the epilogue (fused). A tile of W goes from shared memory to registers in the layout of that operand,
where one shift, one mask and one addition make two weights of two codes: 128 + code has the code as its lowest bits in
bfloat16. They are code - zero, exact; the scale of a group is applied to the float32 sum over the group's inputs. So
about 1.4 instructions a weight, of about 3.4 for which there is time while it is read.

K is summed in steps of 16 within a group and group after group, whatever the tiles: with one number of splits a row's
bits are the same for every M. Bytes: those of W.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.linear.grouped import CODES_PER_WORD, GroupedLinear
from baton.kernels.triton.launch import cdiv, launch_options, require
from baton.kernels.triton.linear import prefetch
from baton.kernels.triton.linear_policy import Tiles


@triton.constexpr_function
def unpacking(place):
    """Of two words in a register: the codes at this place, as 128 + code, plus $2."""
    shifted = f"shr.u32 t, $1, {4 * place}; " if place else "mov.b32 t, $1; "
    codes = "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; "  # (t & mask) | exponents
    return "{ .reg .b32 t, one; mov.b32 one, 0x3f803f80; " + shifted + codes + "fma.rn.bf16x2 $0, t, one, $2; }"


@triton.constexpr_function
def quarters(place):
    """As `unpacking`, a quarter of it, with one shift of the words for all places. $2: -(32 + zero / 4) at places 0 and
    2, -zero / 4 at 1 and 3, whose code, alone in bits 4 to 7, is the bfloat16 code * 2**-129."""
    shifted = "shr.u32 t, $1, 8; " if place >= 2 else "mov.b32 t, $1; "
    if place % 2:
        codes, factor = "and.b32 t, t, 0x00f000f0; ", "0x7f007f00"  # 2**127
    else:
        codes, factor = "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; ", "0x3e803e80"  # 1/4
    declared = f"{{ .reg .b32 t, factor; mov.b32 factor, {factor}; "
    return declared + shifted + codes + "fma.rn.bf16x2 $0, t, factor, $2; }"


@triton.jit
def _codes(words, minus_zero, PLACE: tl.constexpr, ASM: tl.constexpr):
    """[TILE_N, W]: codes at this place of the words, less the zero; minus_zero is -(128 + zero)."""
    if ASM:
        return tl.inline_asm_elementwise(
            unpacking(PLACE), "=r,r,r", [words, minus_zero], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        codes = (words.to(tl.int32) >> (4 * PLACE)) & 15
        return (codes.to(tl.float32) + (minus_zero.to(tl.float32) + 128.0)).to(tl.bfloat16)


@triton.jit
def _beside(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, 2 * COLUMNS]; moves nothing between threads."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, 2 * COLUMNS))


@triton.jit
def _of_group(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, TILE_N: tl.constexpr):
    """[TILE_N]: row GROUP of values [GROUPS, TILE_N]."""
    if GROUPS == 1:
        return tl.reshape(values, (TILE_N,))
    elif GROUPS == 2:
        first, second = tl.split(tl.permute(values, (1, 0)))
        return second if GROUP else first
    else:
        even, odd = tl.split(tl.permute(tl.reshape(values, (2, 2, TILE_N)), (2, 0, 1)))
        first, second = tl.split(odd if GROUP % 2 else even)
        return second if GROUP // 2 else first


@triton.jit
def weights_of_group(
    words, zeros, GROUP: tl.constexpr, GROUPS: tl.constexpr, TILE_N: tl.constexpr, WIDTH: tl.constexpr,
    ZEROS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[TILE_N, 4 * WIDTH / GROUPS] bfloat16: codes - zeros of a group of the block that words [TILE_N, WIDTH] hold."""
    if ZEROS:
        bits = _of_group(zeros, GROUP, GROUPS, TILE_N).to(tl.int16) - 0x3D00  # 0xC300, that is -128, and the zero
        minus_zero = tl.broadcast_to(bits.to(tl.bfloat16, bitcast=True)[:, None], (TILE_N, WIDTH))
    else:
        minus_zero = tl.full((TILE_N, WIDTH), -136.0, tl.float32).to(tl.bfloat16)
    if GROUPS == 4:
        return _codes(words, minus_zero, GROUP, ASM)
    elif GROUPS == 2:
        left, right = _codes(words, minus_zero, 2 * GROUP, ASM), _codes(words, minus_zero, 2 * GROUP + 1, ASM)
        return _beside(left, right, TILE_N, WIDTH)
    else:
        left = _beside(_codes(words, minus_zero, 0, ASM), _codes(words, minus_zero, 1, ASM), TILE_N, WIDTH)
        right = _beside(_codes(words, minus_zero, 2, ASM), _codes(words, minus_zero, 3, ASM), TILE_N, WIDTH)
        return _beside(left, right, TILE_N, 2 * WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_int4_kernel(
    x_desc, words_desc, scales_desc, zeros_desc, words_ptr, bias_ptr, out_ptr, num_rows, N: tl.constexpr,
    K: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, SPLITS: tl.constexpr, FUSED: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A block of 4 * WIDTH inputs a step, in which there are GROUPS groups, or one that is at least as long."""
    first_m = tl.program_id(0) * TILE_M
    first_n = tl.program_id(1) * TILE_N
    split = tl.program_id(2)
    first_k = split * (K // SPLITS)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch(words_ptr + first_n.to(tl.int64) * (K // 4) + first_k // 4, K // 4, TILE_N, PREFETCH // 4)
            if FUSED:
                up_ptr = words_ptr + (N + first_n).to(tl.int64) * (K // 4) + first_k // 4
                prefetch(up_ptr, K // 4, TILE_N, PREFETCH // 4)
        gdc_wait()
    n = first_n + tl.arange(0, TILE_N)
    m = first_m + tl.arange(0, TILE_M)
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    up = tl.zeros([TILE_N, TILE_M], tl.float32)
    for k in tl.range(first_k, first_k + K // SPLITS, 4 * WIDTH):
        words = words_desc.load([first_n, k // 4])
        scales = scales_desc.load([k // GROUP, first_n])
        zeros = scales
        if ZEROS:
            zeros = zeros_desc.load([k // GROUP, first_n])
        if FUSED:
            up_words = words_desc.load([N + first_n, k // 4])
            up_scales = scales_desc.load([k // GROUP, N + first_n])
            up_zeros = up_scales
            if ZEROS:
                up_zeros = zeros_desc.load([k // GROUP, N + first_n])
        for group in tl.static_range(GROUPS):
            x = x_desc.load([first_m, k + group * (4 * WIDTH // GROUPS)])
            weights = weights_of_group(words, zeros, group, GROUPS, TILE_N, WIDTH, ZEROS, ASM)
            scale = _of_group(scales, group, GROUPS, TILE_N).to(tl.float32)
            total += tl.dot(weights, x.T) * scale[:, None]
            if FUSED:
                weights = weights_of_group(up_words, up_zeros, group, GROUPS, TILE_N, WIDTH, ZEROS, ASM)
                scale = _of_group(up_scales, group, GROUPS, TILE_N).to(tl.float32)
                up += tl.dot(weights, x.T) * scale[:, None]
    if FUSED:
        total = total / (1.0 + tl.exp(-total)) * up
    if BIAS:  # noqa: SIM102 - known when compiling, the next one is not
        if split == 0:
            total += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    place = out_ptr + split.to(tl.int64) * num_rows * N + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(m < num_rows)[None, :])


def linear_int4(
    x: torch.Tensor,
    weight: GroupedLinear,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    fused: bool = False,
    pdl: bool = False,
) -> None:
    """As linear.linear; tiles.tile_k is the weight's block."""
    (num_rows, k), block, bias = x.shape, weight.block, weight.bias
    n = weight.num_outputs // (2 if fused else 1)
    groups = max(1, block // weight.inputs_per_scale)
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(x.dtype == torch.bfloat16, "x must be bfloat16")
    require(weight.num_inputs == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(tiles.tile_k == block, f"{tiles} are not for blocks of {block}")
    require(n % tiles.tile_n == 0 and k % (tiles.splits * block) == 0, f"{tiles} do not divide [{n}, {k}]")
    require(groups in (1, 2, 4), f"{groups} groups in a block")
    require(weight.zeros is None or groups * tiles.tile_n >= 128, "zero points of a tile are less than 128 bytes")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    for tensor in (x, weight.words, weight.scales, weight.zeros, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    width = block // CODES_PER_WORD
    prefetched = min(tiles.prefetch, 1 << (k // tiles.splits).bit_length() - 1)
    scales = TensorDescriptor.from_tensor(weight.scales, [groups, tiles.tile_n])
    zeros = scales if weight.zeros is None else TensorDescriptor.from_tensor(weight.zeros, [groups, tiles.tile_n])
    _linear_int4_kernel[(cdiv(num_rows, tiles.tile_m), n // tiles.tile_n, tiles.splits)](
        TensorDescriptor.from_tensor(x, [tiles.tile_m, block // groups]),
        TensorDescriptor.from_tensor(weight.words, [tiles.tile_n, width]),
        scales, zeros, weight.words, weight.words if bias is None else bias, out, num_rows, N=n, K=k,
        TILE_N=tiles.tile_n, TILE_M=tiles.tile_m, WIDTH=width, GROUP=weight.inputs_per_scale, GROUPS=groups,
        SPLITS=tiles.splits, FUSED=fused, ZEROS=weight.zeros is not None, BIAS=bias is not None,
        PREFETCH=prefetched, PDL=pdl, ASM=x.device.type != "cpu",
        **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip
