"""Checks of products whose weights are bytes, for any device; as `kernel_checks`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels.triton.linear_8bit import BLOCK, linear_8bit
from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels.kernel_checks import error, poison, randn

FP8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FP8: 448.0, INT8: 127.0}


def quantised(values: torch.Tensor, code_type: torch.dtype, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales of rows x columns each, and the numbers that these stand for, in float64."""
    tiles = values.double().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = (tiles.abs().amax((1, 3), keepdim=True) / LARGEST[code_type]).float()
    codes = tiles / scales
    codes = (codes.round() if code_type == INT8 else codes.float()).to(code_type)
    exact = (codes.double() * scales.double()).reshape(values.shape)
    return codes.reshape(values.shape), scales[:, 0, :, 0].contiguous(), exact


def check_linear_8bit(
    device: str,
    code_type: torch.dtype,
    rows: int,
    n: int,
    k: int,
    tiles: Tiles,
    *,
    dtype: torch.dtype = torch.bfloat16,
    blocked: bool = False,
    coded: bool = False,
    fused: bool = False,
    biased: bool = False,
    pdl: bool = False,
    tolerance: float = 1e-5,
) -> torch.Tensor:
    """coded: x is quantised too. The error is at most that of rounding the result, or `tolerance`. The result."""
    wide = 2 * n if fused else n
    weight = randn((wide, k), torch.float32, "cpu", 1) / k**0.5
    codes, scales, weight = quantised(weight, code_type, *((BLOCK, BLOCK) if blocked else (1, k)))
    x, x_scales = randn((rows, k), dtype, "cpu"), None
    exact_x = x.double()
    if coded:
        x, x_scales, exact_x = quantised(x, code_type, 1, BLOCK)
        x_scales = x_scales.t().contiguous().to(device)
    bias = randn((n,), dtype, "cpu", 2) if biased else None
    exact = F.linear(exact_x, weight, None if bias is None else bias.double())
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    out = poison((rows, n), dtype, device)
    if tiles.splits > 1:
        out = poison((tiles.splits, rows, n), torch.float32, device)
    linear_8bit(
        x.to(device), codes.to(device), (scales if blocked else scales[:, 0].contiguous()).to(device),
        None if bias is None else bias.to(device), tiles, out, x_scales=x_scales, fused=fused, pdl=pdl,
    )  # fmt: skip
    found = (out.sum(0) if tiles.splits > 1 else out).cpu()
    bound = max(2 * error(exact.to(out.dtype), exact), tolerance)
    assert error(found, exact) <= bound, f"error {error(found, exact):.2e}, allowed {bound:.2e}"
    return out
