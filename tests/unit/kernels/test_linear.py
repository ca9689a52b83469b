"""kernels.linear: a packed weight's product for any number of rows, with programs for a few numbers only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from baton.kernels.linear import DenseLinear, padded_rows


def test_any_number_of_rows_up_to_a_full_step_makes_few_programs() -> None:
    """Guards the memory of a worker: a program for each number of rows took 0.7 GB after ten minutes of load."""
    assert len({padded_rows(num_rows) for num_rows in range(1, 513)}) <= 64
    for num_rows in range(1, 9000):
        assert num_rows <= padded_rows(num_rows) <= num_rows * 9 / 8
    assert [padded_rows(num_rows) for num_rows in (0, 1, 15, 17, 33)] == [0, 1, 15, 18, 36]


@pytest.mark.parametrize("biased", [False, True])
def test_padding_changes_no_row(biased: bool) -> None:
    """Guards rows against those that were added, and the shape of the result."""
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 16), torch.randn(24) if biased else None
    linear = DenseLinear(weight.clone(), bias)
    linear.pack()
    for num_rows in (0, 1, 17, 33, 100):
        x = torch.randn(num_rows, 16)
        y = linear(x)
        assert y.shape == (num_rows, 24) and y.is_contiguous()
        torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
