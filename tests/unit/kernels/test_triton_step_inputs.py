"""The inputs of a decode step out of what the device keeps for each slot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from tests.unit.kernels import kernel_checks as checks


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_step_inputs(device, block_tokens):
    """Guards against another slot's token or blocks, and padding that writes keys or reads out of the tables."""
    checks.check_step_inputs(device, num_rows=9, width=40, block_tokens=block_tokens)


def test_even_chunks(device):
    """Guards against a chunk that is cut otherwise by the programs that leave parts and the one that merges them."""
    plan = checks.decode_plan.DecodePlan(5, 128, 3, True, even=True)
    for window in (None, 70):
        checks.check_decode_attention(
            device, torch.float32, checks.Heads(4, 2, 64), [1, 64, 65, 250, 333, 640], 16, plan, window
        )
