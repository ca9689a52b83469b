"""Checksums and copies of whole blocks."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton import blocks
from baton.tests.unit.kernels import kernel_checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 2, 2, 16, 2, 8), (3, 3, 2, 4, 1, 20), (4, 5, 2, 64, 4, 32), (4, 4)])
def test_checksums_and_copies(device, dtype, shape):
    """Guards against a last slice cut off or read past its end, and bits that a copy of numbers would change."""
    checks.check_blocks(device, dtype, shape, 3)


@pytest.mark.parametrize(("step_words", "row_words"), [(64, 65), (65, 64), (1024, 8200), (3, 33)])
def test_checksums_of_rows(device, step_words, row_words):
    """Guards against rows at the distance of their size, where padding or scales put them elsewhere."""
    checks.check_rows(device, step_words, row_words)


def test_odd_sizes_are_refused(device):
    """Guards against a block whose last bytes no word holds."""
    pool = torch.zeros(3, 3, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="64-bit words"):
        blocks.gather_blocks(pool, torch.zeros(1, dtype=torch.int32, device=device), pool)
