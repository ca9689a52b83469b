"""Norms of all query heads of a token together, and of all its key heads, before rope (OLMoE).

    q = q / sqrt(mean(q**2) + eps) * query_weight;  k = k / sqrt(mean(k**2) + eps) * key_weight;  v = v

x is [N, Q + 2 K], or [S, N, ...] partial sums of the product before, added in order. In float32 between load and store.
A program does one part of a row, so a row's bits do not depend on the other rows. Bytes: S * size(x) + size(out).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import launch_options, next_power_of_2, require


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _whole_norm_kernel(
    x_ptr, query_weight_ptr, key_weight_ptr, out_ptr, num_rows, eps, Q: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, PARTIALS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)  # 0: query, 1: key, 2: value
    element = tl.arange(0, BLOCK)
    width = tl.where(which == 0, Q, K)
    inside = element < width
    weight = tl.load(query_weight_ptr + element, mask=inside & (which == 0), other=0.0).to(tl.float32)
    weight += tl.load(key_weight_ptr + element, mask=inside & (which == 1), other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = row * (Q + 2 * K) + tl.where(which == 0, 0, Q + (which - 1) * K) + element
    total = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTIALS):
        shift = part * num_rows.to(tl.int64) * (Q + 2 * K)
        total += tl.load(x_ptr + shift + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / width + eps)
    total = tl.where(which == 2, total, total * scale * weight)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def whole_norm(
    x: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Fills out [N, Q + 2 K], which may be x; weights [Q] and [K]; all contiguous."""
    num_rows, (q, k) = len(out), (len(query_weight), len(key_weight))
    require(
        tuple(out.shape) == tuple(x.shape[-2:]) == (num_rows, q + 2 * k), f"x {tuple(x.shape)}, out {tuple(out.shape)}"
    )
    for tensor in (x, query_weight, key_weight, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    _whole_norm_kernel[(num_rows, 3)](
        x, query_weight, key_weight, out, num_rows, eps, Q=q, K=k, BLOCK=next_power_of_2(max(q, k)),
        PARTIALS=x.shape[0] if x.dim() == 3 else 1, PDL=pdl, **launch_options(8, pdl),
    )  # fmt: skip
