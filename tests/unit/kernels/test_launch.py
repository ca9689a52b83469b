"""What wrappers compute for a launch."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

import triton

from baton.kernels.triton.launch import cdiv, next_power_of_2


def test_sizes_are_those_that_triton_computes():
    """Guards against blocks that are too small for what they hold."""
    for count in range(1, 300):
        assert next_power_of_2(count) == triton.next_power_of_2(count)
        assert [cdiv(count, size) for size in range(1, 20)] == [triton.cdiv(count, size) for size in range(1, 20)]
