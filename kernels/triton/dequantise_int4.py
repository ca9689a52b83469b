"""W of 4 bits as a matrix of bfloat16 for products of many rows, where the time is that of arithmetic.

The numbers are those of `kernels.int4`, computed in float32 and rounded once. Bytes: those of W, and N * K * 2 written.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.int4 import CODES_PER_WORD, Int4Matrix
from baton.kernels.triton.launch import require

TILE_N = 16


@triton.jit
def _dequantise_int4_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """One block of TILE_N rows a program, run by run of inputs that lie at one place of the words."""
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    column = tl.arange(0, WIDTH)
    first_k = tl.program_id(0) * (4 * WIDTH)
    row = n[:, None].to(tl.int64)
    inside = n < N
    words = tl.load(words_ptr + row * (K // 4) + first_k // 4 + column[None, :], mask=inside[:, None]).to(tl.int32)
    for place in tl.static_range(4):
        k = first_k + place * WIDTH
        of_group = (k // GROUP) * N + n
        values = ((words >> (4 * place)) & 15).to(tl.float32)
        if ZEROS:
            values -= tl.load(zeros_ptr + of_group, mask=inside).to(tl.float32)[:, None]
        else:
            values -= 8.0
        values *= tl.load(scales_ptr + of_group, mask=inside).to(tl.float32)[:, None]
        tl.store(out_ptr + row * K + k + column[None, :], values.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def dequantise_int4(weight: Int4Matrix, out: torch.Tensor) -> None:
    """Fills out [N, K]."""
    n, k = weight.num_outputs, weight.num_inputs
    require(tuple(out.shape) == (n, k), f"out {tuple(out.shape)} is not {(n, k)}")
    for tensor in (weight.words, weight.scales, weight.zeros, out):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _dequantise_int4_kernel[(k // weight.block, triton.cdiv(n, TILE_N))](
        weight.words, weight.scales, zeros, out, N=n, K=k, TILE_N=TILE_N, WIDTH=weight.block // CODES_PER_WORD,
        GROUP=weight.group, ZEROS=weight.zeros is not None, num_warps=4,
    )  # fmt: skip
