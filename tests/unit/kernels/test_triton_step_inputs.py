"""The inputs of a decode step out of what the device keeps for each slot."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.tests.unit.kernels import kernel_checks as checks


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_step_inputs(device, block_tokens):
    """Guards against another slot's token or blocks, and padding that writes keys or reads out of the tables."""
    checks.check_step_inputs(device, num_rows=9, width=40, block_tokens=block_tokens)
