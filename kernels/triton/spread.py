"""Rows by expert: out[p] = x[t(p)] for every pair p of a token and an expert it chose, as `route` orders them.

For products that load tiles of rows whole. One program a token reads its row once. Bytes: (1 + k) T K * element size.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, next_power_of_2, require
from baton.kernels.triton.route import Routes

BLOCK, WARPS = 2048, 8


@triton.jit
def _spread_kernel(x_ptr, positions_ptr, out_ptr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x_ptr + token * WIDTH + column, mask=inside)
    for choice in tl.static_range(CHOICES):
        position = tl.load(positions_ptr + token * CHOICES + choice)
        tl.store(out_ptr + position.to(tl.int64) * WIDTH + column, value, mask=inside & (position >= 0))


def spread(x: torch.Tensor, routes: Routes, out: torch.Tensor) -> None:
    """Fills the rows of out [most_tiles * tile_m, K] that some token has; x [T, K]."""
    num_rows, width = x.shape
    require(tuple(out.shape) == (routes.most_tiles * routes.tile_m, width), f"out {tuple(out.shape)}")
    require(len(routes.positions) == num_rows and out.dtype == x.dtype, "x does not fit the routes")
    require(x.is_contiguous() and out.is_contiguous(), "tensors must be contiguous")
    if num_rows:
        _spread_kernel[(num_rows, cdiv(width, BLOCK))](
            x, routes.positions, out, WIDTH=width, CHOICES=routes.positions.shape[1],
            BLOCK=min(BLOCK, next_power_of_2(width)), num_warps=WARPS,
        )  # fmt: skip
