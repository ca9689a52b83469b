"""Activations in codes: by a kernel of its own, in the norm, and behind silu."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.quantise import CodedRows, quantise
from baton.tests.unit.kernels import checks_8bit as checks

CODE_TYPES = [checks.FP8, checks.INT8]


@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [0, 128])
def test_quantise(device, code_type, dtype, run):
    """Guards against a division by a largest value of 0, ties, and runs past the last of a row."""
    checks.check_quantise(device, code_type, dtype, 3, 896, run)
    checks.check_quantise(device, code_type, dtype, 1, 128, run)


@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("run", [0, 128])
def test_norm_and_silu(device, code_type, run):
    """Guards against codes of what was normed before it was added, and of columns past an odd width."""
    checks.check_norm_in_codes(device, code_type, 3, 896, run)
    checks.check_silu_in_codes(device, code_type, 3, 896, run)


def test_what_does_not_fit_is_refused(device):
    """Guards against a kernel that writes past the end of what it was given."""
    x = torch.zeros(2, 256, device=device)
    for rows, scales in (((3, 256), (3,)), ((2, 256), (3,)), ((2, 256), (2, 1)), ((2, 256), (3, 2))):
        out = CodedRows(torch.zeros(rows, dtype=torch.int8, device=device), torch.zeros(scales, device=device))
        with pytest.raises(ValueError, match=r"codes|scales"):
            quantise(x, out)
