"""Products with weights of 4 bits on a GPU, where codes are unpacked by inline assembly."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.linear_int4 import linear_int4
from baton.kernels.triton.linear_policy import Tiles
from baton.models.cuda.products import Products, fastest, invariant, shape_of
from baton.tests.unit.kernels import int4_checks as checks
from baton.tests.unit.kernels.kernel_checks import error, poison, randn

pytestmark = pytest.mark.gpu
GPU = "cuda"


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_products(group, with_zeros):
    """Guards against codes, scales or zeros of another place, in each form in which the compiler unpacks them."""
    weight = checks.make_int4(1024, 4096, group, GPU, with_zeros)
    checks.check_dequantise_int4(weight)
    for rows in (1, 16, 23):
        checks.check_linear_int4(weight, rows, Tiles(128, 0, 16, 4, 4), biased=True)
        checks.check_linear_int4(weight, rows, Tiles(64, 0, 16, 4, 1), fused=True, pdl=True)
    checks.check_linear_int4(weight, 60, Tiles(128, 0, 64, 3, 2, 8, 1024), pdl=True)
    checks.check_linear_int4(weight, 300, Tiles(64, 0, 128, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_dtype(dtype):
    weight = checks.make_int4(512, 1024, 128, GPU, True, dtype)
    checks.check_linear_int4(weight, 7, Tiles(128, 0, 16, 4, 1))
    checks.check_dequantise_int4(weight)


@pytest.mark.parametrize("group", [32, 128])
def test_a_row_has_the_same_bits_for_any_number_of_rows_and_any_tiles(group):
    """Guards --deterministic: the batch must not change a row's bits."""
    n, k = 1024, 4096
    weight, x = checks.make_int4(n, k, group, GPU), randn((256, k), torch.bfloat16, GPU)
    results = []
    for rows in (1, 8, 16, 33, 64, 100, 256):
        for tile_n, warps in ((64, 4), (128, 4), (128, 8)):
            tiles = Tiles(tile_n, weight.block, 16 if rows <= 16 else 64, 3, 2, warps)
            out = poison((2, rows, n), torch.float32, GPU)
            linear_int4(x[:rows].contiguous(), weight, tiles, out)
            results.append(out)
    assert all(torch.equal(out, results[-1][:, : out.shape[1]]) for out in results)


@pytest.fixture
def hopper() -> None:
    from baton.kernels.triton.prefill_gluon import is_available

    if not is_available(torch.cuda.get_device_capability()):
        pytest.skip("needs Hopper and a Triton whose Gluon is known")


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.usefixtures("hopper")
def test_hopper_products(group, with_zeros):
    """Guards against a ring that is refilled while it is read, sums of a warpgroup that are left out, and codes below
    bfloat16's normal numbers that an instruction takes for 0."""
    weight = checks.make_int4(2048, 4096, group, GPU, with_zeros)
    for rows in (1, 16, 23):
        checks.check_linear_int4_gluon(weight, rows, Tiles(64, 0, 16, 6, 1, 12), fused=True, pdl=True)
    checks.check_linear_int4_gluon(weight, 3, Tiles(64, 0, 8, 6, 1, 12), fused=True, pdl=True)
    weight.bias = randn((2048,), torch.bfloat16, GPU, 2)
    for rows in (5, 60, 200):
        checks.check_linear_int4_gluon(weight, rows, Tiles(128, 0, 32, 4, 2, 8))


@pytest.mark.usefixtures("hopper")
def test_hopper_products_of_more_units_than_programs():
    """Guards against phases of the ring and of the meeting of sums, from the second unit of a program on."""
    weight = checks.make_int4(40960, 1024, 128, GPU)
    checks.check_linear_int4_gluon(weight, 9, Tiles(128, 0, 16, 6, 1, 12), pdl=True)
    checks.check_linear_int4_gluon(weight, 9, Tiles(64, 0, 16, 6, 1, 12), fused=True)
    checks.check_linear_int4_gluon(weight, 40, Tiles(128, 0, 32, 4, 4, 8))
    checks.check_linear_int4_gluon(weight, 100, Tiles(128, 0, 64, 4, 4, 8))


@pytest.mark.usefixtures("hopper")
def test_a_row_has_the_same_bits_on_hopper_for_any_number_of_rows():
    from baton.kernels.triton.linear_int4_gluon import linear_int4_gluon

    weight, x = checks.make_int4(1024, 4096, 128, GPU), randn((256, 4096), torch.bfloat16, GPU)
    results = []
    for rows in (1, 8, 16, 33, 64, 100, 256):
        tile_m = next((size for size in (16, 32) if rows <= size), 64)
        out = poison((2, rows, 1024), torch.float32, GPU)
        linear_int4_gluon(x[:rows].contiguous(), weight, Tiles(128, weight.block, tile_m, 4, 2, 8), 132, out)
        results.append(out)
    assert all(torch.equal(out, results[-1][:, : out.shape[1]]) for out in results)


@pytest.mark.parametrize("policy", [fastest, invariant])
@pytest.mark.parametrize("ordered", [False, True])
def test_products_of_a_model(policy, ordered):
    """Guards the choice of kernels and of tiles by number of rows, and x brought into the order of the inputs."""
    n, k = 2048, 4096
    weight = checks.make_int4(n, k, 128, GPU)
    if ordered:
        weight.order = torch.randperm(k, generator=torch.Generator().manual_seed(0)).to(GPU, torch.int32)
    shapes = shape_of(weight), shape_of(weight, fused=True)
    products = Products(policy, 300, shapes, torch.bfloat16, GPU)
    for rows in (1, 12, 70, 300):
        x, out = randn((rows, k), torch.bfloat16, GPU), poison((rows, n), torch.bfloat16, GPU)
        exact = x.float() @ weight.dequantised(torch.float32).t()
        found = products(weight, x, out, pdl=False)
        assert error(found.sum(0) if found.dim() == 3 else found, exact) < 5e-3
        gated = poison((rows, n // 2), torch.bfloat16, GPU)
        products.gated(weight, x, gated, pdl=False)
        gate, up = exact.chunk(2, -1)
        assert error(gated, torch.nn.functional.silu(gate) * up) < 1e-2
