"""Products with few rows whose weights are bytes: FP8 and INT8, scales of outputs and of blocks, x in codes or not."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels import checks_8bit as checks

ROWS = Tiles(64, 128, 16, 3, 1)
SPLIT = Tiles(64, 128, 16, 3, 2)
ONE = Tiles(64, 256, 0, 1, 1)


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_several_rows(device, code_type, blocked, coded):
    """Guards against rows past the last, and the scale of another output, block, row or 128 inputs."""
    given = {"blocked": blocked, "coded": coded}
    checks.check_linear_8bit(device, code_type, 20, 128, 512, ROWS, **given)
    checks.check_linear_8bit(device, code_type, 3, 256, 512, SPLIT, biased=True, **given)
    checks.check_linear_8bit(device, code_type, 17, 128, 256, ROWS, fused=True, **given)


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
@pytest.mark.parametrize("blocked", [False, True])
def test_one_row(device, code_type, blocked):
    """Guards against the last part of the columns, which is asked for one step ahead, and scales one step behind."""
    for fused, biased in ((False, True), (True, False)):
        checks.check_linear_8bit(device, code_type, 1, 256, 512, ONE, blocked=blocked, fused=fused, biased=biased)


@pytest.mark.parametrize("blocked", [False, True])
def test_float32(device, blocked):
    """Guards against an x that is rounded to bfloat16 on its way to the product."""
    given = {"dtype": torch.float32, "blocked": blocked}
    checks.check_linear_8bit(device, checks.FP8, 5, 128, 256, ROWS, **given)
    checks.check_linear_8bit(device, checks.FP8, 1, 128, 256, ONE, **given)


def test_what_does_not_fit_is_refused(device):
    """Guards against scales that no program, or another block's, multiplies by."""
    with pytest.raises(ValueError, match="do not divide"):
        checks.check_linear_8bit(device, checks.FP8, 1, 16, 128, Tiles(2, 256, 0, 1, 1))
    with pytest.raises(ValueError, match="128 columns at a time"):
        checks.check_linear_8bit(device, checks.FP8, 3, 128, 256, Tiles(64, 64, 16, 3, 1), blocked=True)
    with pytest.raises(ValueError, match="not in codes"):
        checks.check_linear_8bit(device, checks.FP8, 1, 128, 256, ONE, coded=True)
