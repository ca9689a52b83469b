"""activation(gate) * up of the two halves of a row: out[n, i] = activation(g) * u, g = x[n, i], u = x[n, width + i].

    silu(g) = g / (1 + exp(-g));  gelu_tanh(g) = g / (1 + exp(-2 sqrt(2 / pi) (g + 0.044715 g^3)))
The latter is 0.5 g (1 + tanh(...)) written with the same function: 0.5 (1 + tanh(y)) = 1 / (1 + exp(-2 y)).
In float32 between load and store. `out` may be in codes, as `quantise` makes them: then one program has a whole row.
Bytes: 3 * N * width * element size.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.reference import LARGEST_CODE
from baton.kernels.triton.launch import cdiv, launch_options, next_power_of_2, require
from baton.kernels.triton.quantise import CodedRows, check_codes, store_codes

BLOCK, WARPS = 2048, 8
ROW_WARPS = 16


@triton.jit
def activated(gate, GELU: tl.constexpr):
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    return gate / (1.0 + tl.exp(-inner))


@triton.jit
def _gated(x_ptr, column, WIDTH: tl.constexpr, GELU: tl.constexpr):
    """activation(gate) * up of a row that begins at x_ptr; 0 past its end."""
    inside = column < WIDTH
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    return activated(gate, GELU) * up


@triton.jit
def _act_and_mul_kernel(
    x_ptr, out_ptr, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = _gated(x_ptr + row * 2 * WIDTH, column, WIDTH, GELU)
    tl.store(out_ptr + row * WIDTH + column, value.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["scale_stride"])
def _act_and_mul_codes_kernel(
    x_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
    RUN: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = _gated(x_ptr + row * 2 * WIDTH, tl.arange(0, BLOCK), WIDTH, GELU)
    store_codes(value, codes_ptr, scales_ptr, row, scale_stride, WIDTH, BLOCK, RUN, LARGEST)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | CodedRows, *, pdl: bool = False) -> None:
    """As reference.silu_and_mul, into `out` [N, width]; gate_up [N, 2 * width], gate first; both contiguous."""
    _launch(gate_up, out, False, pdl)


def gelu_tanh_and_mul(gate_up: torch.Tensor, out: torch.Tensor | CodedRows, *, pdl: bool = False) -> None:
    """As reference.gelu_tanh_and_mul, with the shapes of `silu_and_mul`."""
    _launch(gate_up, out, True, pdl)


def _launch(gate_up: torch.Tensor, out: torch.Tensor | CodedRows, gelu: bool, pdl: bool) -> None:
    values = out.codes if isinstance(out, CodedRows) else out
    num_rows, width = values.shape
    require(tuple(gate_up.shape) == (num_rows, 2 * width), f"gate_up {tuple(gate_up.shape)} is not twice out's width")
    require(gate_up.is_contiguous() and values.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    if isinstance(out, CodedRows):
        run, stride = check_codes(out, num_rows, width)
        _act_and_mul_codes_kernel[(num_rows,)](
            gate_up, out.codes, out.scales, stride, WIDTH=width, GELU=gelu, BLOCK=next_power_of_2(width),
            RUN=run, LARGEST=LARGEST_CODE[out.codes.dtype], PDL=pdl, **launch_options(ROW_WARPS, pdl),
        )  # fmt: skip
        return
    block = min(BLOCK, next_power_of_2(width))
    _act_and_mul_kernel[(num_rows, cdiv(width, block))](
        gate_up, out, WIDTH=width, GELU=gelu, BLOCK=block, PDL=pdl, **launch_options(WARPS, pdl)
    )
