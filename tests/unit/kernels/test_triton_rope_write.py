"""Rotation of queries and keys, and the write into the pool."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.tests.unit.kernels import kernel_checks as checks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("partials", [0, 1, 2])
def test_dtypes_norms_and_partial_sums(device, dtype, normed, partials):
    """Guards against a norm that covers values or several heads, and a partial sum left out."""
    checks.check_rope_and_write(device, dtype, checks.Heads(4, 2, 16), 3, 16, partials, normed)


@pytest.mark.parametrize(("dim", "rotary_dim"), [(128, 96), (96, 48), (16, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_a_part_of_a_head_is_rotated(device, dim, rotary_dim, normed):
    """Guards against pairs of the whole head, and elements behind the part that are scaled or left out."""
    checks.check_rope_and_write(device, torch.float32, checks.Heads(4, 2, dim), 3, 16, 0, normed, False, rotary_dim)


@pytest.mark.parametrize("heads", [(1, 1, 64), (4, 4, 80), (6, 2, 96), (8, 4, 128), (14, 2, 64), (2, 1, 256)])
@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_shapes(device, heads, block_tokens):
    """Guards against halves of a head_dim that is no power of two, heads that a program's share cuts, and slots."""
    checks.check_rope_and_write(device, torch.bfloat16, checks.Heads(*heads), 3, block_tokens, 0, True)
