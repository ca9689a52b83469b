"""Cosines, logarithms and the like of many numbers on the CPU, with the same bits in every process.

On x86 torch hands them to Intel's oneMKL, which chooses the code of each function when it is first called. Where
several threads make this first call at once, as they do for a large tensor, one of them may compute its part by code
of about 11 bits; the next call is right (https://github.com/pytorch/pytorch/issues/188792, oneMKL 2024.2). A worker
with such a table of rotations answers with other tokens than the workers beside it, until it is started again.
"""

from __future__ import annotations

import torch

FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.log1p, torch.tanh)
"""Those of oneMKL's that models are computed with."""


def prepare_vector_math() -> None:
    """Before the first call with many numbers: one number is computed by one thread. Takes microseconds."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in FUNCTIONS:
            function(one)
