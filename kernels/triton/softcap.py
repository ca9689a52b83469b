"""Scores of attention within bounds, as Gemma 2 has them: limit * tanh(score / limit)."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)


@triton.jit
def bounded(scores, LIMIT: tl.constexpr):
    """tanh(y) = 1 - 2 / (exp(2 y) + 1): the ends are exact where exp is 0 or infinite."""
    TWICE: tl.constexpr = 2.885390081777927 / LIMIT  # 2 log2(e): exp2 is the hardware's
    return LIMIT - 2.0 * LIMIT / (tl.exp2(scores * TWICE) + 1.0)


def limit_log2(softcap: float | None) -> float:
    """The limit of scores that are multiples of log2(e); 0: none."""
    return 0.0 if softcap is None else softcap * LOG2_E
