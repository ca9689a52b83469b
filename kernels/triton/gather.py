"""Columns of x in another order: out[m, k] = x[m, order[k]]. Bytes: x read, out written, order read once a row."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import cdiv, launch_options, require

BLOCK = 2048


@triton.jit
def _gather_columns_kernel(x_ptr, order_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    order = tl.load(order_ptr + column, mask=inside, other=0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(out_ptr + row * K + column, tl.load(x_ptr + row * K + order, mask=inside), mask=inside)


def gather_columns(x: torch.Tensor, order: torch.Tensor, out: torch.Tensor, *, pdl: bool = False) -> None:
    """Fills out [M, K]; x [M, K], order [K] int32."""
    num_rows, k = x.shape
    require(out.shape == x.shape and out.dtype == x.dtype, f"out {tuple(out.shape)} is not {tuple(x.shape)}")
    require(tuple(order.shape) == (k,), f"order {tuple(order.shape)} is not [{k}]")
    for tensor in (x, order, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    _gather_columns_kernel[(num_rows, cdiv(k, BLOCK))](
        x, order, out, K=k, BLOCK=BLOCK, PDL=pdl, **launch_options(4, pdl)
    )
