"""Quantised weights to plain ones, in the layouts of kernels.linear: the numbers that their codes stand for.

    out[n, k] = codes[n, k] * scales[n // outputs_per_scale, k // inputs_per_scale]                   8 bits
    out[n, order[k]] = (code[n, k] - zeros[n, k // inputs_per_scale]) * scales[n, k // inputs_per_scale]    4 bits

In float32 and rounded once, as `dequantised` there does, bit for bit. Bytes: codes read, out written; 3 N K and 2.5 N K
where out has 16 bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.linear.grouped import MIDDLE
from baton.kernels.triton.launch import launch_options, require

BLOCK, WARPS = 2048, 4


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
    codes_ptr, scales_ptr, zeros_ptr, order_ptr, out_ptr, K: tl.constexpr, INPUTS: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    both = tl.load(codes_ptr + row * (K // 2) + pair, mask=pair < K // 2, other=0)
    codes = tl.interleave(both & 15, both >> 4).to(tl.float32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    group = row * (K // INPUTS) + column // INPUTS
    if ZEROS:
        codes -= tl.load(zeros_ptr + group, mask=inside, other=0).to(tl.float32)
    else:
        codes -= MIDDLE
    value = codes * tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
    if ORDERED:
        column = tl.load(order_ptr + column, mask=inside, other=0)
    tl.store(out_ptr + row * K + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def dequantise_scaled(
    codes: torch.Tensor, scales: torch.Tensor, outputs_per_scale: int, inputs_per_scale: int, out: torch.Tensor
) -> None:
    """Of a ScaledLinear; out [N, K]."""
    n, k = codes.shape
    columns = triton.cdiv(k, inputs_per_scale)
    require(out.shape == codes.shape, f"out {tuple(out.shape)} is not {(n, k)}")
    require(scales.numel() == triton.cdiv(n, outputs_per_scale) * columns, f"{scales.numel()} scales do not fit")
    require(all(tensor.is_contiguous() for tensor in (codes, scales, out)), "tensors must be contiguous")
    block = min(BLOCK, triton.next_power_of_2(k))
    _dequantise_scaled_kernel[(n, triton.cdiv(k, block))](
        codes, scales, out, K=k, SCALES=columns, OUTPUTS=outputs_per_scale, INPUTS=inputs_per_scale, BLOCK=block,
        **launch_options(WARPS, False),
    )  # fmt: skip


def dequantise_groups(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    inputs_per_scale: int,
    out: torch.Tensor,
) -> None:
    """Of a GroupedLinear; out [N, K]."""
    n, k = out.shape
    groups = (n, k // inputs_per_scale)
    require(tuple(codes.shape) == (n, k // 2) and k % 2 == 0, f"codes {tuple(codes.shape)} are not those of {(n, k)}")
    require(k % inputs_per_scale == 0 and tuple(scales.shape) == groups, f"scales {tuple(scales.shape)} do not fit")
    require(zeros is None or tuple(zeros.shape) == groups, "zeros are not shaped as scales")
    require(order is None or tuple(order.shape) == (k,), "order is not [K]")
    for tensor in (codes, scales, zeros, order, out):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    block = min(BLOCK, triton.next_power_of_2(k))
    _dequantise_groups_kernel[(n, triton.cdiv(k, block))](
        codes, scales, codes if zeros is None else zeros, codes if order is None else order, out, K=k,
        INPUTS=inputs_per_scale, MIDDLE=MIDDLE, ZEROS=zeros is not None, ORDERED=order is not None, BLOCK=block,
        **launch_options(WARPS, False),
    )  # fmt: skip
