"""Checks of products whose weights are bytes, for any device; as `kernel_checks`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from baton.kernels import reference
from baton.kernels.triton import activation, norm
from baton.kernels.triton.linear_8bit import BLOCK, linear_8bit
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.quantise import RUN, CodedRows, quantise
from baton.tests.unit.kernels.kernel_checks import EPS, error, poison, randn

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def quantised(values: torch.Tensor, code_type: torch.dtype, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales of rows x columns each, and the numbers that these stand for, in float64."""
    tiles = values.double().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = (tiles.abs().amax((1, 3), keepdim=True) / reference.LARGEST_CODE[code_type]).float()
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
    blocked: bool = False,
    runs: bool = False,
    fused: bool = False,
    biased: bool = False,
    pdl: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    tolerance: float = 1e-5,
    product: Callable[..., None] = linear_8bit,
) -> torch.Tensor:
    """The error is at most that of rounding the result, or `tolerance`: that of FP8's sums. The result.

    Run twice over poison, as a ring that is left half full would show."""
    weight = randn(((2 if fused else 1) * n, k), torch.float32, "cpu", 1) / k**0.5
    codes, scales, weight = quantised(weight, code_type, *((BLOCK, BLOCK) if blocked else (1, k)))
    x_codes, x_scales, exact_x = quantised(randn((rows, k), torch.float32, "cpu"), code_type, 1, RUN if runs else k)
    x_scales = F.pad(x_scales.t(), (0, -rows % 4)) if runs else x_scales[:, 0]
    x = CodedRows(x_codes.to(device), x_scales.contiguous().to(device))
    bias = randn((n,), torch.bfloat16, "cpu", 2) if biased else None
    exact = F.linear(exact_x, weight, None if bias is None else bias.double())
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    bound = max(2 * error(exact.to(torch.float32 if tiles.splits > 1 else dtype), exact), tolerance)
    codes, scales = codes.to(device), (scales if blocked else scales[:, 0].contiguous()).to(device)
    for _ in range(2):
        out = poison((rows, n), dtype, device)
        if tiles.splits > 1:
            out = poison((tiles.splits, rows, n), torch.float32, device)
        product(x, codes, scales, None if bias is None else bias.to(device), tiles, out, fused=fused, pdl=pdl)
        found = (out.sum(0) if tiles.splits > 1 else out).cpu()
        assert error(found, exact) <= bound, f"error {error(found, exact):.2e}, allowed {bound:.2e}"
    return out


def coded_rows(device: str, code_type: torch.dtype, rows: int, width: int, run: int) -> CodedRows:
    """Poisoned. run 0: one scale a row."""
    codes = torch.full((rows, width), 77, dtype=torch.uint8, device=device).view(code_type)
    return CodedRows(codes, poison((width // run, rows + 3) if run else (rows,), torch.float32, device))


def assert_codes(found: CodedRows, values: torch.Tensor, run: int) -> None:
    """They are those of `values` [M, K], which the kernel may have rounded otherwise: few codes differ, by one step."""
    (rows, width), code_type = values.shape, found.codes.dtype
    codes, scales = reference.quantise(values.cpu(), code_type, run or width)
    stored = found.scales.cpu()[:, :rows] if run else found.scales.cpu()[None]
    torch.testing.assert_close(stored, scales, rtol=1e-5, atol=0.0)
    ours, theirs = found.codes.cpu().float(), codes.float()
    assert (ours != theirs).float().mean() < 0.01
    assert bool(((ours - theirs).abs() <= (theirs.abs() / 8).clamp(min=1.0 if code_type == INT8 else 2**-9)).all())


def check_quantise(device: str, code_type: torch.dtype, dtype: torch.dtype, rows: int, width: int, run: int) -> None:
    """Equal to the reference bit for bit; the first values are 0."""
    x = 3 * randn((rows, width), dtype, device)
    x[0, : run or width] = 0.0
    out = coded_rows(device, code_type, rows, width, run)
    quantise(x, out)
    codes, scales = reference.quantise(x.cpu(), code_type, run or width)
    assert torch.equal(out.codes.cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out.scales.cpu()[:, :rows] if run else out.scales.cpu()[None], scales)


def check_norm_in_codes(device: str, code_type: torch.dtype, rows: int, width: int, run: int) -> None:
    x, weight = randn((2, rows, width), torch.float32, device), randn((width,), torch.bfloat16, device, 1)
    residual = randn((rows, width), torch.bfloat16, device, 2)
    added = (residual.float() + x.sum(0)).to(torch.bfloat16)
    out = coded_rows(device, code_type, rows, width, run)
    norm.add_rms_norm(x, residual, weight, EPS, out)
    assert torch.equal(residual, added)
    assert_codes(out, reference.rms_norm(added.float(), weight.float(), EPS), run)
    norm.rms_norm(added, weight, EPS, out)
    assert_codes(out, reference.rms_norm(added.float(), weight.float(), EPS), run)


def check_silu_in_codes(device: str, code_type: torch.dtype, rows: int, width: int, run: int) -> None:
    gate_up = randn((rows, 2 * width), torch.bfloat16, device)
    out = coded_rows(device, code_type, rows, width, run)
    activation.silu_and_mul(gate_up, out)
    assert_codes(out, reference.silu_and_mul(gate_up.float()), run)
