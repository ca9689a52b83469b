"""y = x W^T (+ b) for few rows of x where a weight is a byte: W[n, k] = codes[n, k] * scale, codes FP8 (e4m3) or INT8.

A scale belongs to an output (scales [N]), or to a block of 128 outputs and 128 inputs ([N / 128, K / 128]). These are
the two kernels of `linear` with other weights: W lies in memory as in the checkpoint and is read once, and split parts
of K are left in float32 to the kernel that reads them.
  * x of 16 bits: codes are widened to bfloat16 in registers, which is exact.
  * x in codes of W's type, with a scale for each row and 128 inputs: both operands stay bytes.
K is summed in one order whatever the tiles; with scales of blocks, or x in codes, the matrix unit sums 128 inputs at a
time, and those sums are added in float32. Bytes: W, N * K (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.linear_policy import Tiles

BLOCK = 128
"""Outputs, and inputs, that share a scale."""


@triton.jit
def _prefetch(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks the L2 cache for ROWS x COLUMNS bytes, one instruction each 128."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS // 128)[None, :]
    address = (ptr + row * stride + column * 128).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _fp8_by_floats(codes):
    """FP8 as bfloat16, exactly, by way of float16 and float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 l, h, a, b, c, d; .reg .b32 p, q; .reg .f32 w, x, y, z;
        mov.b32 {l, h}, $2;
        cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h;
        mov.b32 {a, b}, p; mov.b32 {c, d}, q;
        cvt.f32.f16 w, a; cvt.f32.f16 x, b; cvt.f32.f16 y, c; cvt.f32.f16 z, d;
        cvt.rn.bf16x2.f32 $0, x, w; cvt.rn.bf16x2.f32 $1, z, y;
        }""",
        "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _fp8_by_bits(codes):
    """The same: sign, exponent and fraction at their places make a bfloat16 that is 2**120 too small."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 l, h, p, q, c;
        mov.b32 c, 0x7B807B80;
        prmt.b32 l, $2, 0, 0x1404; prmt.b32 h, $2, 0, 0x3424;
        shr.u32 p, l, 4; shr.u32 q, h, 4;
        and.b32 p, p, 0x07F007F0; and.b32 q, q, 0x07F007F0;
        lop3.b32 p, l, 0x80008000, p, 0xEA; lop3.b32 q, h, 0x80008000, q, 0xEA;
        mul.rn.bf16x2 $0, p, c; mul.rn.bf16x2 $1, q, c;
        }""",
        "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _int8_by_bits(codes):
    """INT8 as bfloat16, exactly: q + 128 in the low byte of the float32 2**23."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 u, p, q, r, s; .reg .f32 w, x, y, z;
        xor.b32 u, $2, 0x80808080;
        prmt.b32 p, u, 0x4B000000, 0x7440; prmt.b32 q, u, 0x4B000000, 0x7441;
        prmt.b32 r, u, 0x4B000000, 0x7442; prmt.b32 s, u, 0x4B000000, 0x7443;
        mov.b32 w, p; mov.b32 x, q; mov.b32 y, r; mov.b32 z, s;
        sub.f32 w, w, 0f4B000080; sub.f32 x, x, 0f4B000080; sub.f32 y, y, 0f4B000080; sub.f32 z, z, 0f4B000080;
        cvt.rn.bf16x2.f32 $0, x, w; cvt.rn.bf16x2.f32 $1, z, y;
        }""",
        "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _operand(codes, x, WIDEN: tl.constexpr):
    """A tile of W as the matrix unit multiplies it by x: bytes by bytes, or widened, which is exact."""
    if codes.dtype == x.dtype:
        return codes
    elif WIDEN == 1:
        return _fp8_by_floats(codes)
    elif WIDEN == 2:
        return _fp8_by_bits(codes)
    elif WIDEN == 3:
        return _int8_by_bits(codes)
    else:
        return codes.to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_8bit_rows_kernel(
    x_desc, codes_desc, codes_ptr, scale_ptr, x_scale_ptr, bias_ptr, out_ptr, num_rows, N: tl.constexpr,
    K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_M: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, FUSED: tl.constexpr, BLOCKED: tl.constexpr, CODED: tl.constexpr, WIDEN: tl.constexpr,
    BIAS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0) * TILE_M
    first_n = tl.program_id(1) * TILE_N
    split = tl.program_id(2)
    first_k = split * (K // SPLITS)
    end_k = first_k + K // SPLITS
    n = first_n + tl.arange(0, TILE_N)
    m = first_m + tl.arange(0, TILE_M)
    inside = m < num_rows
    COLUMNS: tl.constexpr = K // BLOCK
    GATE_ROWS: tl.constexpr = N // BLOCK
    gate_scales = scale_ptr + first_n // BLOCK * COLUMNS
    scale, up_scale = 1.0, 1.0
    if BLOCKED:
        scale = tl.load(gate_scales + first_k // BLOCK)
        if FUSED:
            up_scale = tl.load(gate_scales + GATE_ROWS * COLUMNS + first_k // BLOCK)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            _prefetch(codes_ptr + first_n.to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
            if FUSED:
                _prefetch(codes_ptr + (N + first_n).to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
        gdc_wait()
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    up = total
    x_scale = tl.zeros([TILE_M], tl.float32) + 1.0
    if CODED:
        x_scale = tl.load(x_scale_ptr + first_k // BLOCK * num_rows + m, mask=inside, other=0.0)
    for k in tl.range(first_k, end_k, TILE_K):
        x = x_desc.load([first_m, k])
        if BLOCKED or CODED:
            # the scales of the next columns are asked for before those of these are used
            following = tl.where(k + TILE_K < end_k, k + TILE_K, first_k) // BLOCK
            part = tl.dot(_operand(codes_desc.load([first_n, k]), x, WIDEN), x.T, input_precision="ieee")
            total += part.to(tl.float32) * (x_scale * scale)[None, :]
            if FUSED:
                part = tl.dot(_operand(codes_desc.load([N + first_n, k]), x, WIDEN), x.T, input_precision="ieee")
                up += part.to(tl.float32) * (x_scale * up_scale)[None, :]
            if BLOCKED:
                scale = tl.load(gate_scales + following)
                if FUSED:
                    up_scale = tl.load(gate_scales + GATE_ROWS * COLUMNS + following)
            if CODED:
                x_scale = tl.load(x_scale_ptr + following * num_rows + m, mask=inside, other=0.0)
        else:
            codes = _operand(codes_desc.load([first_n, k]), x, WIDEN)
            total = tl.dot(codes, x.T, total, input_precision="ieee")
            if FUSED:
                codes = _operand(codes_desc.load([N + first_n, k]), x, WIDEN)
                up = tl.dot(codes, x.T, up, input_precision="ieee")
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


@triton.jit
def _linear_8bit_row_kernel(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As linear's: one part of W is always on its way. Parts are [TILE_N, TILE_K / BLOCK, BLOCK]."""
    first_n = tl.program_id(0) * TILE_N
    n = first_n + tl.arange(0, TILE_N)
    block = tl.arange(0, TILE_K // BLOCK)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    place = codes_ptr + n[:, None, None].to(tl.int64) * K + column[None, :, :]
    codes = tl.load(place, eviction_policy="evict_first")
    total = tl.zeros([TILE_N, TILE_K // BLOCK, BLOCK], tl.float32)
    up = total
    up_place = place + N * K
    up_codes = codes
    if FUSED:
        up_codes = tl.load(up_place, eviction_policy="evict_first")
    COLUMNS: tl.constexpr = K // BLOCK
    scales = scale_ptr + first_n // BLOCK * COLUMNS + block
    up_scales = scales + N // BLOCK * COLUMNS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for k in tl.range(0, K, TILE_K, num_stages=1, loop_unroll_factor=2):
        following = tl.where(k + TILE_K < K, k + TILE_K, 0)
        used = codes.to(tl.float32)
        codes = tl.load(place + following, eviction_policy="evict_first")
        x = tl.load(x_ptr + k + column).to(tl.float32)
        scaled = x
        if BLOCKED:
            scaled = x * tl.load(scales + k // BLOCK)[:, None]
        total += used * scaled[None, :, :]
        if FUSED:
            used = up_codes.to(tl.float32)
            up_codes = tl.load(up_place + following, eviction_policy="evict_first")
            scaled = x
            if BLOCKED:
                scaled = x * tl.load(up_scales + k // BLOCK)[:, None]
            up += used * scaled[None, :, :]
    result = tl.sum(tl.sum(total, 2), 1)
    if not BLOCKED:
        result *= tl.load(scale_ptr + n)
    if FUSED:
        gate = result
        result = tl.sum(tl.sum(up, 2), 1)
        if not BLOCKED:
            result *= tl.load(scale_ptr + N + n)
        result = gate / (1.0 + tl.exp(-gate)) * result
    if BIAS:
        result += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty))


def linear_8bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    fused: bool = False,
    pdl: bool = False,
    widen: int = 1,
) -> None:
    """Fills out [M, N], or [splits, M, N] float32.

    x [M, K] of 16 or 32 bits, or of codes' type with x_scales [K / 128, M]; codes [N, K] ([2 N, K] when fused) FP8 or
    INT8; scales float32 [N] or [N / 128, K / 128] (twice that when fused); bias [N] or None.
    The tiles must divide N and K / splits. A fused product has one split and no bias.
    """
    (num_rows, k), n = x.shape, codes.shape[0] // (2 if fused else 1)
    blocked, coded = scales.dim() == 2, x_scales is not None
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(codes.shape[1] == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(n % tiles.tile_n == 0 and k % (tiles.splits * tiles.tile_k) == 0, f"{tiles} do not divide [{n}, {k}]")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    wanted = (codes.shape[0] // BLOCK, k // BLOCK) if blocked else (codes.shape[0],)
    require(tuple(scales.shape) == wanted and scales.dtype == torch.float32, f"scales {tuple(scales.shape)}")
    require(not (blocked and n % BLOCK) and not ((blocked or coded) and k % BLOCK), "blocks are of 128")
    require(not blocked or BLOCK % tiles.tile_n == 0, f"{tiles} cut blocks")
    require(
        x_scales is None or (tuple(x_scales.shape) == (k // BLOCK, num_rows) and x.dtype == codes.dtype), "x_scales"
    )
    for tensor in (x, codes, scales, out, bias, x_scales):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    sums = scales if bias is None else bias
    if tiles.tile_m == 0:
        require(num_rows == 1 and tiles.splits == 1 and not coded, "these tiles are for one row, not in codes")
        require(tiles.tile_k % BLOCK == 0, "one row is read in blocks of 128")
        _linear_8bit_row_kernel[(n // tiles.tile_n,)](
            x, codes, scales, sums, out, N=n, K=k, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, BLOCK=BLOCK, FUSED=fused,
            BLOCKED=blocked, BIAS=bias is not None, PDL=pdl, **launch_options(tiles.warps, pdl, 1),
        )  # fmt: skip
        return
    require(not (blocked or coded) or tiles.tile_k == BLOCK, "scales of blocks are applied 128 columns at a time")
    _linear_8bit_rows_kernel[(triton.cdiv(num_rows, tiles.tile_m), n // tiles.tile_n, tiles.splits)](
        TensorDescriptor.from_tensor(x, [tiles.tile_m, tiles.tile_k]),
        TensorDescriptor.from_tensor(codes, [tiles.tile_n, tiles.tile_k]),
        codes, scales, x_scales if coded else scales, sums, out, num_rows, N=n, K=k, TILE_N=tiles.tile_n,
        TILE_K=tiles.tile_k, TILE_M=tiles.tile_m, SPLITS=tiles.splits, BLOCK=BLOCK, FUSED=fused, BLOCKED=blocked,
        CODED=coded, WIDEN=_widening(x, codes, widen), BIAS=bias is not None, PREFETCH=tiles.prefetch, PDL=pdl,
        **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip


def _widening(x: torch.Tensor, codes: torch.Tensor, fp8: int) -> int:
    """Which of the ways above makes bfloat16 of codes; 0: Triton's own, which the interpreter has."""
    if x.dtype != torch.bfloat16 or x.is_cpu:
        return 0
    return 3 if codes.dtype == torch.int8 else fp8
