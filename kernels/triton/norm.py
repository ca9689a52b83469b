"""Root mean square norm of each row, alone or after adding to the residual.

    residual = round(residual + sum_s x[s]);  out = residual / sqrt(mean(residual**2) + eps) * weight

x is [N, width], or [S, N, width] partial sums of the matrix product before (split-K), added in the order of s: the
reduction of a split product then needs no launch of its own. Everything is in float32 between load and store. One
program a row, so a row's bits do not depend on the other rows. Bytes: x and residual read, residual and out written,
(S * size(x) + 3 * size(out)) * N * width.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import launch_options, require

WARPS = 16  # measured on the H200 at widths of 4096: one program reads a whole row, and there are few rows


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = row * WIDTH + column
    total = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTIALS):
        total += tl.load(x_ptr + part * num_rows.to(tl.int64) * WIDTH + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + place, rounded, mask=inside)
        total = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / WIDTH + eps)
    tl.store(out_ptr + place, (total * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, *, pdl: bool = False) -> None:
    """out = norm of the rows of x; x and out [N, width], weight [width], all contiguous."""
    _launch(x, None, weight, eps, out, pdl)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, *, pdl: bool = False
) -> None:
    """As reference.add_rms_norm, into `out`; x [N, width] or partial sums [S, N, width], the others [N, width]."""
    _launch(x, residual, weight, eps, out, pdl)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor, pdl: bool
) -> None:
    num_rows, width = out.shape
    require(tuple(x.shape[-2:]) == (num_rows, width), f"x {tuple(x.shape)} does not fit out {tuple(out.shape)}")
    require(residual is None or residual.shape == out.shape, "residual and out differ in shape")
    require(tuple(weight.shape) == (width,), f"weight {tuple(weight.shape)} is not [{width}]")
    for tensor in (x, residual, weight, out):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    _norm_kernel[(num_rows,)](
        x,
        out if residual is None else residual,
        weight,
        out,
        num_rows,
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        PARTIALS=x.shape[0] if x.dim() == 3 else 1,
        ADD=residual is not None,
        PDL=pdl,
        **launch_options(WARPS, pdl),
    )
