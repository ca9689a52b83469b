"""Activations in codes: rows of FP8 (e4m3) or INT8 with float32 scales, for products that multiply bytes by bytes.

    scale = max |x| / largest code;  codes = round(x * (largest code / max |x|));  both 0 where x is all 0

over a row (scales [M]), or over runs of 128 of its values (scales [K / 128, M], as cuBLAS reads them). One program has
a row, so a row's codes do not depend on the others. `store_codes` is for kernels that have a row at hand; `quantise`
is a kernel of its own. Bytes: 3 M K where x has 16 bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.reference import LARGEST_CODE
from baton.kernels.triton.launch import launch_options, next_power_of_2, require

RUN = 128
"""Values of a row that share a scale, where a row has several."""
WARPS = 8


class CodedRows(NamedTuple):
    """M rows of K activations."""

    codes: torch.Tensor  # [M, K] float8_e4m3fn or int8
    scales: torch.Tensor  # float32 [M] of rows; or [K / 128, S] of runs, S >= M


SMALLEST = tl.constexpr(2.0**-100)  # of what is divided by: all that is smaller becomes 0
ROUNDER = tl.constexpr(12582912.0)  # added to a float32 below 2**22, it leaves no bit for a fraction: rounds to even


@triton.jit
def codes_of(values, factor, codes_ptr):
    if codes_ptr.dtype.element_ty == tl.int8:
        # Between limits, lest the product is not rounded before ROUNDER is added (one fused operation).
        return (tl.minimum(tl.maximum(values * factor, -127.0), 127.0) + ROUNDER - ROUNDER).to(tl.int8)
    else:
        return (values * factor).to(codes_ptr.dtype.element_ty)


@triton.jit
def store_codes(
    values, codes_ptr, scales_ptr, row, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """values: a row, float32 [BLOCK], 0 from WIDTH on. RUN 0: one scale for the row."""
    column = tl.arange(0, BLOCK)
    if RUN == 0:
        most = tl.max(tl.abs(values), 0)
        factor = tl.div_rn(LARGEST, tl.maximum(most, SMALLEST))
        tl.store(scales_ptr + row, tl.div_rn(most, LARGEST))
        codes = codes_of(values, factor, codes_ptr)
    else:
        runs = tl.reshape(values, [BLOCK // RUN, RUN])
        most = tl.max(tl.abs(runs), 1)
        factor = tl.div_rn(LARGEST, tl.maximum(most, SMALLEST))
        run = tl.arange(0, BLOCK // RUN)
        scales = scales_ptr + run.to(tl.int64) * num_rows + row
        tl.store(scales, tl.div_rn(most, LARGEST), mask=run < WIDTH // RUN)
        codes = tl.reshape(codes_of(runs, factor[:, None], codes_ptr), [BLOCK])
    tl.store(codes_ptr + row * WIDTH + column, codes, mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    x_ptr, codes_ptr, scales_ptr, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x_ptr + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    store_codes(values, codes_ptr, scales_ptr, row, num_rows, WIDTH, BLOCK, RUN, LARGEST)


def quantise(x: torch.Tensor, out: CodedRows, *, pdl: bool = False) -> None:
    """As reference.quantise; x [M, K], contiguous."""
    num_rows, width = x.shape
    run, stride = check_codes(out, num_rows, width)
    require(x.is_contiguous(), "x must be contiguous")
    if num_rows == 0:
        return
    _quantise_kernel[(num_rows,)](
        x, out.codes, out.scales, stride, WIDTH=width, BLOCK=next_power_of_2(width), RUN=run,
        LARGEST=LARGEST_CODE[out.codes.dtype], PDL=pdl, **launch_options(WARPS, pdl),
    )  # fmt: skip


def check_codes(out: CodedRows, num_rows: int, width: int) -> tuple[int, int]:
    """RUN and num_rows for `store_codes`; ValueError unless `out` has num_rows rows of so many values."""
    codes, scales = out
    require(tuple(codes.shape) == (num_rows, width), f"codes {tuple(codes.shape)} are not {(num_rows, width)}")
    require(codes.dtype in LARGEST_CODE and scales.dtype == torch.float32, "codes are FP8 or INT8, scales float32")
    require(codes.is_contiguous() and scales.is_contiguous(), "tensors must be contiguous")
    if scales.dim() == 1:
        require(tuple(scales.shape) == (num_rows,), f"scales {tuple(scales.shape)} are not [{num_rows}]")
        return 0, num_rows
    runs, stride = scales.shape
    require(width % RUN == 0 and runs == width // RUN and stride >= num_rows, f"scales {tuple(scales.shape)}")
    return RUN, stride
