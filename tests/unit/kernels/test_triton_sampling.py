"""The choice of the next token."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.tests.unit.kernels import kernel_checks as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [3, 4096, 9001])
def test_argmax(device, dtype, vocab_size):
    """Guards against ties that fall to another id, tokens past the end, and blocks in another order."""
    checks.check_argmax(device, dtype, 3, vocab_size)


def test_uniforms_equal_the_definition(device):
    """Guards against a replay on another device that draws another token."""
    checks.check_uniforms(device, 3)


def test_noise_of_small_uniforms(device):
    """Guards against a token of 2**-25 probability that is drawn each time it comes up."""
    checks.check_small_uniforms(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [100, 9001])
def test_draws(device, dtype, vocab_size):
    """Guards against rows that share a seed, a temperature that multiplies, and filtered tokens that are drawn."""
    checks.check_draw(device, dtype, 7, vocab_size)
