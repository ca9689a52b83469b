"""Quantised weights to plain ones, bit for bit as the references in kernels.linear."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.dequantise import dequantise_groups, dequantise_scaled
from baton.tests.unit.kernels import kernel_checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("block", [(1, 2100), (8, 128), (1, 700)])
def test_codes_of_8_bits(device, dtype, codes, block):
    """Guards against a scale of the next row or column of blocks, an end that is cut off, and a second rounding."""
    checks.check_dequantise_scaled(device, codes, dtype, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("zeros", "order"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("inputs_per_scale", [16, 32, 2112])
def test_codes_of_4_bits(device, dtype, zeros, order, inputs_per_scale):
    """Guards against codes of a word exchanged, or with a sign; zero points of another group; inputs left sorted."""
    checks.check_dequantise_groups(device, dtype, inputs_per_scale, zeros, order)


def test_wrong_shapes_are_refused(device):
    """Guards against a kernel that reads or writes past the end of what it was given."""
    codes, out = torch.zeros(4, 8, dtype=torch.int8, device=device), torch.zeros(4, 8, device=device)
    with pytest.raises(ValueError, match="2 scales"):
        dequantise_scaled(codes, out[0, :2].contiguous(), 1, 8, out)
    with pytest.raises(ValueError, match="words"):
        dequantise_groups(codes[:, :2].contiguous().view(torch.int16), out, None, None, 32, out)
