"""Products with few rows whose weights are bytes: FP8 and INT8, scales of outputs and blocks, of rows and runs."""

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels import checks_8bit as checks

ROWS = Tiles(64, 128, 16, 3, 1)
WIDE = Tiles(64, 256, 16, 3, 1)
SPLIT = Tiles(64, 128, 16, 3, 2)
TALL = Tiles(64, 128, 32, 3, 1)


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_several_rows(device, code_type, blocked, runs):
    """Guards against rows past the last, and the scale of another output, block, row or run."""
    given = {"blocked": blocked, "runs": runs}
    checks.check_linear_8bit(device, code_type, 20, 128, 512, ROWS, **given)
    checks.check_linear_8bit(device, code_type, 1, 256, 512, SPLIT, biased=True, **given)
    checks.check_linear_8bit(device, code_type, 33, 128, 256, TALL, **given)
    checks.check_linear_8bit(device, code_type, 17, 128, 512, WIDE, fused=True, **given)


def test_what_does_not_fit_is_refused(device):
    """Guards against scales that no program, or another block's, multiplies by."""
    with pytest.raises(ValueError, match="do not divide"):
        checks.check_linear_8bit(device, checks.FP8, 1, 16, 128, WIDE)
    with pytest.raises(ValueError, match="every 128 columns"):
        checks.check_linear_8bit(device, checks.FP8, 3, 128, 256, Tiles(64, 64, 16, 3, 1), blocked=True)
    with pytest.raises(ValueError, match="cut through blocks"):
        checks.check_linear_8bit(device, checks.FP8, 3, 256, 256, Tiles(256, 128, 16, 3, 1), blocked=True)
