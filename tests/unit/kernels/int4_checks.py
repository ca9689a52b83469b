"""Checks of the kernels of 4-bit weights that hold for any device: small shapes in the interpreter, large on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from baton.kernels import GroupedLinear
from baton.kernels.linear.grouped import block_size, pack_codes
from baton.kernels.triton.dequantise import dequantise_groups
from baton.kernels.triton.linear_int4 import linear_int4
from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels.kernel_checks import error, poison, randn

BF16 = torch.bfloat16


def random_codes(n: int, k: int) -> torch.Tensor:
    """[n, k] uint8 on the CPU, the same in every process."""
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def make_int4(
    n: int, k: int, group: int, device: str, with_zeros: bool = True, dtype: torch.dtype = torch.float16
) -> GroupedLinear:
    """Random, of products of about 1; zero points from 0 to 16."""
    generator = torch.Generator().manual_seed(4)
    block = block_size(k, group)
    assert block is not None
    words = torch.empty(n, k // 4, dtype=torch.int16)
    pack_codes(random_codes(n, k), block, words)
    scales = (torch.rand(k // group, n, generator=generator) + 0.5) / (7 * k**0.5)
    zeros = torch.randint(0, 17, (k // group, n), dtype=torch.int8, generator=generator) if with_zeros else None
    return GroupedLinear(
        words.to(device), scales.to(dtype).to(device), None if zeros is None else zeros.to(device), block
    )


def check_linear_int4(
    weight: GroupedLinear, rows: int, tiles: Tiles, fused: bool = False, biased: bool = False, pdl: bool = False
) -> torch.Tensor:
    """The error is at most that of rounding the result, or float32's where parts are left unrounded. The result."""
    device = weight.words.device.type
    n, k = weight.num_outputs // (2 if fused else 1), weight.num_inputs
    x = randn((rows, k), BF16, device)
    bias = weight.bias = randn((n,), BF16, device, 2) if biased else None
    exact = F.linear(x.double(), weight.dequantised(torch.float32).double(), None if bias is None else bias.double())
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    shape, dtype = ((rows, n), BF16) if tiles.splits == 1 else ((tiles.splits, rows, n), torch.float32)
    out = poison(shape, dtype, device)
    linear_int4(x, weight, replace(tiles, tile_k=weight.block), out, fused=fused, pdl=pdl)
    found = out.sum(0) if tiles.splits > 1 else out
    bound = max(2 * error(exact.to(dtype), exact), 2e-5)
    assert error(found, exact) <= bound, f"error {error(found, exact):.2e}, allowed {bound:.2e}"
    return out


def check_dequantise_int4(weight: GroupedLinear) -> None:
    """Bit for bit: float32 numbers, rounded once."""
    out = poison((weight.num_outputs, weight.num_inputs), BF16, weight.words.device.type)
    dequantise_groups(weight.words, weight.scales, weight.zeros, weight.order, weight.block, out)
    assert torch.equal(out, weight.dequantised(BF16))


def check_linear_int4_gluon(
    weight: GroupedLinear, rows: int, tiles: Tiles, fused: bool = False, pdl: bool = False
) -> torch.Tensor:
    """On a GPU only. As check_linear_int4, run twice over poison: a ring that is left half full would show."""
    from baton.kernels.triton.linear_int4_gluon import linear_int4_gluon

    n, k = weight.num_outputs // (2 if fused else 1), weight.num_inputs
    x = randn((rows, k), BF16, "cuda")
    exact = F.linear(x.double(), weight.dequantised(torch.float32).double())
    if weight.bias is not None:
        exact += weight.bias
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    shape, dtype = ((rows, n), BF16) if tiles.splits == 1 else ((tiles.splits, rows, n), torch.float32)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    bound = max(2 * error(exact.to(dtype), exact), 2e-5)
    for _ in range(2):
        out = poison(shape, dtype, "cuda")
        linear_int4_gluon(x, weight, replace(tiles, tile_k=weight.block), num_sms, out, fused=fused, pdl=pdl)
        found = out.sum(0) if tiles.splits > 1 else out
        assert error(found, exact) <= bound, f"error {error(found, exact):.2e}, allowed {bound:.2e}"
    return out
