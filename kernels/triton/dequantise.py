"""Quantised weights to plain ones, in the layouts of kernels.linear: the numbers that their codes stand for.

    out[n, k] = codes[n, k] * scales[n // outputs_per_scale, k // inputs_per_scale]                   8 bits
    out[n, order[k]] = (code[n, k] - zeros[k // inputs_per_scale, n]) * scales[k // inputs_per_scale, n]    4 bits

In float32 and rounded once, as `dequantised` there does, bit for bit. Bytes: codes read, out written; 3 N K and 2.5 N K
where out has 16 bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.linear.grouped import BLOCKS, CODES_PER_WORD, MIDDLE
from baton.kernels.triton.launch import cdiv, launch_options, next_power_of_2, require

BLOCK, WARPS = 2048, 4
TILE_N = 16


@triton.jit
def _dequantise_scaled_kernel(
    codes_ptr, scales_ptr, out_ptr, K: tl.constexpr, SCALES: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    codes = tl.load(codes_ptr + row * K + column, mask=inside).to(tl.float32)
    scales = tl.load(scales_ptr + row // OUTPUTS * SCALES + column // INPUTS, mask=inside)
    tl.store(out_ptr + row * K + column, (codes * scales).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantise_groups_kernel(
    words_ptr, scales_ptr, zeros_ptr, order_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, INPUTS: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, ORDERED: tl.constexpr, WIDTH: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """A block of 4 * WIDTH inputs of TILE_N rows, run by run of inputs that lie at one place of the words."""
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    row, inside = n[:, None].to(tl.int64), n < N
    first = tl.program_id(0) * (4 * WIDTH)
    column = tl.arange(0, WIDTH)
    words = tl.load(words_ptr + row * (K // 4) + first // 4 + column[None, :], mask=inside[:, None], other=0)
    for place in tl.static_range(4):  # a place's run is within one group
        of_group = (first + place * WIDTH) // INPUTS * N + n
        codes = ((words.to(tl.int32) >> (4 * place)) & 15).to(tl.float32)
        if ZEROS:
            codes -= tl.load(zeros_ptr + of_group, mask=inside, other=0).to(tl.float32)[:, None]
        else:
            codes -= MIDDLE
        value = codes * tl.load(scales_ptr + of_group, mask=inside, other=0.0).to(tl.float32)[:, None]
        k = first + place * WIDTH + column
        if ORDERED:
            k = tl.load(order_ptr + k)
        tl.store(out_ptr + row * K + k[None, :], value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def dequantise_scaled(
    codes: torch.Tensor, scales: torch.Tensor, outputs_per_scale: int, inputs_per_scale: int, out: torch.Tensor
) -> None:
    """Of a ScaledLinear; out [N, K]."""
    n, k = codes.shape
    columns = cdiv(k, inputs_per_scale)
    require(out.shape == codes.shape, f"out {tuple(out.shape)} is not {(n, k)}")
    require(scales.numel() == cdiv(n, outputs_per_scale) * columns, f"{scales.numel()} scales do not fit")
    require(all(tensor.is_contiguous() for tensor in (codes, scales, out)), "tensors must be contiguous")
    block = min(BLOCK, next_power_of_2(k))
    _dequantise_scaled_kernel[(n, cdiv(k, block))](
        codes, scales, out, K=k, SCALES=columns, OUTPUTS=outputs_per_scale, INPUTS=inputs_per_scale, BLOCK=block,
        **launch_options(WARPS, False),
    )  # fmt: skip


def dequantise_groups(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    block: int,
    out: torch.Tensor,
) -> None:
    """Of a GroupedLinear; out [N, K]."""
    n, k = out.shape
    inputs_per_scale = k // scales.shape[0]
    require(tuple(words.shape) == (n, k // CODES_PER_WORD), f"words {tuple(words.shape)} are not those of {(n, k)}")
    require(block in BLOCKS and k % block == 0, f"{k} inputs are not blocks of {block}")
    require(tuple(scales.shape) == (k // inputs_per_scale, n), f"scales {tuple(scales.shape)} do not fit")
    require(zeros is None or zeros.shape == scales.shape, "zeros are not shaped as scales")
    require(order is None or tuple(order.shape) == (k,), "order is not [K]")
    for tensor in (words, scales, zeros, order, out):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    _dequantise_groups_kernel[(k // block, cdiv(n, TILE_N))](
        words, scales, words if zeros is None else zeros, words if order is None else order, out, N=n, K=k,
        INPUTS=inputs_per_scale, MIDDLE=MIDDLE, ZEROS=zeros is not None, ORDERED=order is not None,
        WIDTH=block // CODES_PER_WORD, TILE_N=TILE_N, **launch_options(WARPS, False),
    )  # fmt: skip
