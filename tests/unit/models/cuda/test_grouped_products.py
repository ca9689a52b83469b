"""Products with 4-bit weights as a model asks for them, against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import GroupedLinear
from baton.kernels.triton import int4_policy
from baton.kernels.triton.linear_policy import ProductShape
from baton.models.cuda.products import Products, fastest, invariant, shape_of
from baton.tests.unit.kernels.int4_checks import make_int4
from baton.tests.unit.kernels.kernel_checks import error, poison, randn

BF16 = torch.bfloat16
N, K = 256, 512


def with_order(weight: GroupedLinear) -> GroupedLinear:
    weight.order = torch.randperm(K, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return weight


@pytest.mark.parametrize("policy", [fastest, invariant])
@pytest.mark.parametrize("rows", [1, 20, 130])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_reference(policy, rows, ordered, biased):
    """Guards against x in another order than codes, a bias left out or added by each part, and parts left unsummed."""
    weight = make_int4(N, K, 128, "cpu")
    weight.bias = randn((N,), BF16, "cpu", 5) if biased else None
    if ordered:
        with_order(weight)
    products = Products(policy, 130, (shape_of(weight), shape_of(weight, fused=True)), BF16, "cpu")
    x, out, gated = randn((rows, K), BF16, "cpu"), poison((rows, N), BF16, "cpu"), poison((rows, N // 2), BF16, "cpu")
    exact = F.linear(x.float(), weight.dequantised(torch.float32), None if weight.bias is None else weight.bias.float())
    found = products(weight, x, out, pdl=False)
    assert error(found.sum(0) if found.dim() == 3 else found, exact) < 5e-3
    products.whole(weight, x, out, pdl=False)
    assert error(out, exact) < 5e-3
    products.gated(weight, x, gated, pdl=False)
    gate, up = exact.chunk(2, -1)
    assert error(gated, F.silu(gate) * up) < 1e-2


SHAPES = [(6144, 4096), (4096, 14336), (8192, 28672), (28672, 4096), (1536, 896), (3584, 18944), (128, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_tiles_fit_their_shape_and_shared_memory(shape, fused, group):
    """Guards against a product that the kernel refuses in the middle of serving."""
    for rows in (1, 16, 17, 64, 128):
        for policy in (int4_policy.fastest, int4_policy.invariant):
            tiles = policy(rows, ProductShape(*shape, fused, f"int4_g{group}_zeros"))
            if tiles is None:
                continue
            assert shape[0] % tiles.tile_n == 0 and shape[1] % (tiles.tile_k * tiles.splits) == 0
            assert tiles.stages >= 3 and not (fused and tiles.splits > 1)


def test_the_invariant_policy_sums_a_weight_in_one_way():
    """Guards against bits that depend on the batch: splits and warpgroups decide the order of sums."""
    for outputs, inputs in SHAPES[:4]:
        shape = ProductShape(outputs, inputs, False, "int4_g128")
        found = {
            (tiles.splits, tiles.warps) for rows in (1, 16, 64, 300) if (tiles := int4_policy.invariant(rows, shape))
        }
        assert len(found) == 1
