"""What the products of gate and up of an expert leave: silu(gate) * up, or kernels.clamped_gate's formula."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_gate(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """LIMIT 0: silu(gate) * up."""
    if LIMIT > 0.0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * up
