"""What adapters add to routed experts: before the gate, and in place."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.routing import Routing
from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels.expert_pair_checks import check_experts_added


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "tiles", "ranks", "held"),
    [
        (torch.float32, 9, Tiles(32, 32, 16, 2, 1), [16, 0, 32], None),
        (torch.bfloat16, 21, Tiles(32, 64, 16, 2, 1), [32, 16], range(2, 5)),
        (torch.bfloat16, 1, Tiles(32, 64, 0, 1, 1), [16, 16], None),
    ],
)
def test_experts_add_what_adapters_add(device, dtype, num_tokens, tiles, ranks, held):
    """Guards against another expert's or adapter's matrices, gate's for up, a rank of zero, rows of tokens without an
    adapter, and experts that another rank holds."""
    check_experts_added(device, dtype, num_tokens, Routing(6, 2), 32, 64, tiles, ranks, 32, held)
