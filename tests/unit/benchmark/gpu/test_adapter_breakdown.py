"""What a step's launches are counted as."""

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.benchmark.gpu.adapter_breakdown import of_pass
from baton.benchmark.gpu.step_breakdown import Interval


def test_a_layer_s_time_goes_to_the_kernels_that_began_first():
    """Guards against time counted twice where launches overlap, and launches of another layer."""
    layer = [("_rope_write_kernel", 0, 2), ("_shrink_ranks_kernel", 2, 6), ("_linear_rows_kernel", 3, 9)]
    passed = [
        Interval(name, (10 * index + begin) * 1000, (10 * index + end) * 1000)
        for index in range(4)
        for name, begin, end in layer
    ]
    found = of_pass(passed, num_layers=4)
    assert found["us"] == {"grouping": 0, "shrink": 4, "expand": 0, "gap": 0.75, "rest": 5}
    assert found["own_us"] == {"grouping": 0, "shrink": 4, "expand": 0, "gap": 0, "rest": 8}
    assert found["layer"] == [(name, begin, end) for name, begin, end in layer]
    assert found["kernels"] == 12 and found["span_ms"] == 0.039
