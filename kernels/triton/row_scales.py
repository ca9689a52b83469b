"""What adapters change of a product that is in memory already: y[row] = c (W x[row]) + b + B (A x[row]).

c [N], of magnitudes (DoRA, arXiv:2402.09353), is that of the row's adapter; the product has its bias b by now, which is
not scaled: y = c y + (1 - c) b. Then B t is added in place (`low_rank`). Of a product in parts each is scaled, and the
first has the bias. Rows without an adapter are left as they are. Bytes: y read and written, c once a row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import cdiv, launch_options, next_power_of_2, require
from baton.kernels.triton.low_rank import EXPAND_ITEMS, AddedProduct, expand

BLOCK, WARPS = 1024, 4


@triton.jit(do_not_specialize=["num_rows"])
def _scale_rows_kernel(
    out_ptr, adapters_ptr, scales_ptr, scales_stride, bias_ptr, num_rows, N: tl.constexpr, STRIDE: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    slot = tl.load(adapters_ptr + row)  # written before the chain of early launches began, as scales
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if slot >= 0:
        scale = tl.load(scales_ptr + slot.to(tl.int64) * scales_stride + n, mask=inside, other=1.0)
        for part in tl.static_range(PARTS):
            place = out_ptr + (part * num_rows.to(tl.int64) + row) * STRIDE + n
            value = tl.load(place, mask=inside, other=0.0).to(tl.float32) * scale
            if BIAS and part == 0:
                value += (1.0 - scale) * tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, value.to(out_ptr.dtype.element_ty), mask=inside)


def add_in_place(
    added: AddedProduct,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    few_programs: int = EXPAND_ITEMS,
    pdl: bool = False,
) -> None:
    """out: the product [M, N], or float32 parts of it [S, M, N]; its rows may lie apart. bias [N]: what it has of one.
    few_programs: as low_rank.expand."""
    if (scales := added.bank.scales_of(added.site)) is not None:
        scale_rows(out, added.rows.adapters, scales, bias, pdl=pdl)
    expand(added, out, few_programs=few_programs, pdl=pdl)


def scale_rows(
    out: torch.Tensor, adapters: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, *, pdl: bool = False
) -> None:
    """Scales out, as add_in_place has it; adapters: slots, int32 [M], below 0: none; scales float32 [slots, N]."""
    num_rows, n = out.shape[-2:]
    require(len(adapters) == num_rows, f"{len(adapters)} adapters for {num_rows} rows")
    require(scales.shape[1] == n and scales.stride(1) == 1 and scales.dtype == torch.float32, "scales of another shape")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    require(out.stride(-1) == 1 and adapters.is_contiguous(), "rows must be contiguous")
    require(out.dim() == 2 or out.stride(0) == num_rows * out.stride(1), "parts must lie behind one another")
    if num_rows:
        block = min(BLOCK, next_power_of_2(n))
        _scale_rows_kernel[(num_rows, cdiv(n, block))](
            out, adapters, scales, scales.stride(0), out if bias is None else bias, num_rows, N=n,
            STRIDE=out.stride(-2), PARTS=out.shape[0] if out.dim() == 3 else 1, BIAS=bias is not None, BLOCK=block,
            PDL=pdl, **launch_options(WARPS, pdl),
        )  # fmt: skip
