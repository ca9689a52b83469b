"""The gate of gpt-oss's experts: bounded, and with one added to what it multiplies. Knows no model.

gate = min(gate, limit);  up = max(min(up, limit), -limit)
out  = (up + 1) * gate * sigmoid(alpha * gate)
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ClampedGate(NamedTuple):
    """The constants of the formula above."""

    limit: float
    alpha: float


def clamped_gate_and_mul(x: torch.Tensor, gate: ClampedGate) -> torch.Tensor:
    """[N, width] of x [N, 2 * width]: gate, then up."""
    gates, up = x.chunk(2, -1)
    gates, up = gates.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
    return (up + 1) * gates * (gate.alpha * gates).sigmoid()
