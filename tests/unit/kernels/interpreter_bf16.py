"""Makes Triton's interpreter compute with bfloat16, and multiply matrices, as a GPU does (Triton 3.6 to 3.8).

Left alone it adds, multiplies and takes dot products of the raw 16 bits as if they were integers, and cuts float32 off
instead of rounding it. Reductions stay wrong, because they run in numpy on the raw bits: kernels reduce in float32.
To FP8 it rounds ties up, and a fraction that rounds up to 2 loses its carry: those casts are torch's here.

Its matrix products are BLAS's, which on some CPUs gives a row other bits at another place of the tile. Summed in
float64 and rounded once, a row's bits depend on that row alone, as they do in a GPU's matrix instructions.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + half) >> 16).astype(np.uint16))


def _fp8_widened(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).float().numpy()


def _fp8_rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of e4m3, to nearest even; what is too large becomes 448, as by the GPU's instruction."""
    clamped = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448.0, 448.0)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _is_bf16(value) -> bool:
    return value.dtype.scalar == tl.bfloat16


def install() -> None:
    """Replaces the interpreter's operations, once; the lambdas beside them look these methods up, so they follow."""
    builder = InterpreterBuilder
    if builder.create_dot.__module__ == __name__:
        return
    binary_op, unary_op, create_dot = builder.binary_op, builder.unary_op, builder.create_dot
    cast_impl, create_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def new_binary_op(self, left, right, op):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary_op(self, left, right, op)
        result = op(_widened(left.data), _widened(right.data))
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_rounded(result), tl.bfloat16)

    def new_unary_op(self, value, op):
        if not _is_bf16(value):
            return unary_op(self, value, op)
        return TensorHandle(_rounded(op(_widened(value.data))), tl.bfloat16)

    def new_create_dot(self, left, right, *rest):
        wide = [_widened(v.data) if _is_bf16(v) else v.data for v in (left, right)]
        if any(data.dtype not in (np.float16, np.float32) for data in wide):
            return create_dot(self, left, right, *rest)
        added = rest[0]
        product = np.matmul(wide[0].astype(np.float64), wide[1].astype(np.float64)).astype(added.data.dtype)
        return TensorHandle(product + added.data, added.dtype.scalar)

    def new_cast_impl(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            wide = TensorHandle(_widened(source.data), tl.float32)
            return wide if after == tl.float32 else cast_impl(self, wide, target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return TensorHandle(_rounded(source.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, source, target)

    def new_create_fp_to_fp(self, source, target, rounding):
        before, after = source.dtype.scalar, target.scalar
        if before == tl.float8e4nv:
            wide = TensorHandle(_fp8_widened(source.data), tl.float32)
            return wide if after == tl.float32 else new_create_fp_to_fp(self, wide, target, rounding)
        if after == tl.float8e4nv:
            wide = source if before == tl.float32 else new_create_fp_to_fp(self, source, tl.float32, None)
            return TensorHandle(_fp8_rounded(wide.data), tl.float8e4nv)
        if tl.bfloat16 in (before, after):
            return new_cast_impl(self, source, target)
        return create_fp_to_fp(self, source, target, rounding)

    builder.binary_op, builder.unary_op, builder.create_dot = new_binary_op, new_unary_op, new_create_dot
    builder.cast_impl, builder.create_fp_to_fp = new_cast_impl, new_create_fp_to_fp
