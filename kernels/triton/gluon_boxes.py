"""How Gluon's kernels read matrices by TMA: in boxes, swizzled in shared memory as matrix instructions take them."""
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int16: gl.int16,
    torch.int8: gl.int8,
}


def boxes(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of so many rows and columns."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns], _layout(rows, columns, matrix.dtype))


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Kept: to make one takes the host half as long as a launch."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], TYPES[dtype])
