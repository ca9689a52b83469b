"""What a token's experts add to its residual: sum_j weights[t, j] * rows[positions[t, j]], in the order of the choices.

Behind it, and after it, what the shared expert adds, which may be parts of a split product and have a gate. It has no
kernel of its own: `norm` sums it beside the residual, in float32. Bytes: k rows a token.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import require
from baton.kernels.triton.route import Routes


@dataclass(frozen=True, slots=True)
class RoutedSum:
    """The sum for T tokens, not yet computed."""

    rows: torch.Tensor  # [P, width]: of experts, in the order of `route`
    routes: Routes
    shared: torch.Tensor | None = None  # [T, width] or parts [S, T, width]
    shared_gated: bool = False
    """Times routes.shared."""

    def check(self, num_rows: int, width: int) -> None:
        positions = self.routes.positions
        require(len(positions) == num_rows, f"routes of {len(positions)} tokens, not {num_rows}")
        require(self.rows.shape[1] == width and self.rows.is_contiguous(), f"rows {tuple(self.rows.shape)}")
        require(positions.is_contiguous() and self.routes.weights.is_contiguous(), "tensors must be contiguous")
        if self.shared is not None:
            require(tuple(self.shared.shape[-2:]) == (num_rows, width), f"shared {tuple(self.shared.shape)}")
            require(self.shared.is_contiguous(), "tensors must be contiguous")


@triton.jit
def routed_sum(rows_ptr, positions_ptr, weights_ptr, row, column, inside, WIDTH: tl.constexpr, CHOICES: tl.constexpr):
    """Of one token, float32; where it has no position, an expert adds nothing."""
    total = tl.zeros(column.shape, tl.float32)
    for choice in tl.static_range(CHOICES):
        position = tl.load(positions_ptr + row * CHOICES + choice).to(tl.int64)
        weight = tl.load(weights_ptr + row * CHOICES + choice)
        value = tl.load(rows_ptr + position * WIDTH + column, mask=inside & (position >= 0), other=0.0)
        total += weight * value.to(tl.float32)
    return total
