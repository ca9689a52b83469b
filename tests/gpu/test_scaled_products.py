"""Products with weights of 8 bits on a GPU, with the shapes of an 8B model: few rows, and many by cuBLAS."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import ScaledLinear, reference
from baton.kernels.triton.linear_policy import DOWN_8B, GATE_UP_8B, O_8B, QKV_8B, Tiles
from baton.kernels.triton.quantise import CodedRows
from baton.models.cuda.products import Products, fastest, invariant, shape_of
from baton.tests.unit.kernels import checks_8bit as checks
from baton.tests.unit.kernels.kernel_checks import error, poison, randn

pytestmark = pytest.mark.gpu

GPU, BF16 = "cuda", torch.bfloat16
FORMATS = {"fp8_row": checks.FP8, "fp8_block": checks.FP8, "int8_row": checks.INT8}


def linear(weight_format: str, outputs: int, inputs: int, biased: bool = False) -> ScaledLinear:
    rows, columns = (128, 128) if weight_format == "fp8_block" else (1, inputs)
    weight = randn((outputs, inputs), torch.float32, GPU, 1).mul_(inputs**-0.5)
    codes, scales, _ = checks.quantised(weight, FORMATS[weight_format], rows, columns)
    bias = randn((outputs,), BF16, GPU, 2) if biased else None
    return ScaledLinear(codes, scales.flatten() if rows == 1 else scales, rows, columns, bias)


def fake(x: torch.Tensor, weight_format: str) -> torch.Tensor:
    """What codes of x stand for."""
    width = 128 if weight_format == "fp8_block" else x.shape[1]
    codes, scales = reference.quantise(x, FORMATS[weight_format], width)
    return codes.double() * scales.double().t().repeat_interleave(width, 1)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_products_are_those_of_rows_in_codes(weight_format):
    """Guards against another layout of scales in cuBLAS, rows that it adds up to a multiple of four, and a bias."""
    qkv, down = linear(weight_format, *QKV_8B[:2], biased=True), linear(weight_format, *DOWN_8B[:2])
    gate_up = linear(weight_format, 2 * GATE_UP_8B.outputs, GATE_UP_8B.inputs)
    shapes = [shape_of(qkv), shape_of(down), shape_of(gate_up, fused=True)]
    products = Products(fastest, 2048, shapes, BF16, GPU)
    wide = {each: each.dequantised(torch.float64) for each in (qkv, down, gate_up)}
    for rows in (1, 2, 16, 33, 64, 100, 128, 129, 301, 2048):
        room = poison((rows + 4, 28672), BF16, GPU).flatten()
        for weights in (qkv, down):
            x = randn((rows, weights.num_inputs), BF16, GPU, 7 + rows)
            coded = products.codes_for(weights, rows) is not None
            exact = (fake(x, weight_format) if coded else x.double()) @ wide[weights].t()
            exact += 0.0 if weights.bias is None else weights.bias.double()
            out = products(weights, x, room[: rows * weights.num_outputs].view(rows, -1), pdl=rows <= 128)
            found = out.double().sum(0) if out.dim() == 3 else out
            assert error(found, exact) < 4e-3, (rows, weights.num_outputs, coded)
        x = randn((rows, gate_up.num_inputs), BF16, GPU, 7 + rows)
        coded = products.codes_for(gate_up, rows) is not None
        gate, up = ((fake(x, weight_format) if coded else x.double()) @ wide[gate_up].t()).chunk(2, -1)
        gated = products.gated(gate_up, x, room[: rows * 14336].view(rows, -1), down, pdl=rows <= 128)
        exact = F.silu(gate) * up
        out = products(down, gated, poison((rows + 4, 4096), BF16, GPU)[:rows], pdl=rows <= 128)
        found = out.double().sum(0) if out.dim() == 3 else out
        if products.codes_for(down, rows) is not None:
            exact = fake(exact.to(BF16), weight_format)
        # Values near the middle of two codes get the other one, because they were rounded before: of INT8 a step is
        # 0.15 of the norm.
        assert error(found, exact @ wide[down].t()) < 3e-2, (rows, "gated")


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_deterministic_row_does_not_depend_on_the_others(weight_format):
    """Guards against another order of a sum in other tiles."""
    o = linear(weight_format, *O_8B[:2])
    gate_up = linear(weight_format, 2 * GATE_UP_8B.outputs, GATE_UP_8B.inputs)
    products = Products(invariant, 300, [shape_of(o), shape_of(gate_up, fused=True)], BF16, GPU)
    x = randn((300, 4096), BF16, GPU)
    rows = (1, 16, 17, 64, 128, 300)
    summed = [products(o, x[:m], poison((m, 4096), BF16, GPU), pdl=False).clone() for m in rows]
    assert all(torch.equal(each[..., :1, :], summed[0]) for each in summed)
    gated = [products.gated(gate_up, x[:m], poison((m, 14336), BF16, GPU), pdl=False)[:1].clone() for m in rows]
    assert all(torch.equal(each, gated[0]) for each in gated)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
def test_kernels(code_type, pdl):
    """The checks of tests/unit/kernels with the shapes of an 8B model: FP8 is summed with 14 bits."""
    tolerance = 5e-4 if code_type == checks.FP8 else 1e-5
    for blocked, runs in ((False, False), (False, True), (True, True)):
        for tiles in (
            Tiles(64, 128, 16, 6, 4),
            Tiles(64, 256, 16, 4, 2),
            Tiles(64, 128, 32, 4, 2),
            Tiles(128, 128, 64, 4, 1, 8),
        ):
            checks.check_linear_8bit(
                GPU, code_type, 33, 4096, 4096, tiles, blocked=blocked, runs=runs, pdl=pdl, tolerance=tolerance
            )


@pytest.fixture
def gluon():
    """linear_8bit_gluon with the multiprocessors at hand."""
    from baton.kernels.triton.linear_8bit_gluon import linear_8bit_gluon
    from baton.kernels.triton.prefill_gluon import is_available

    if not is_available(torch.cuda.get_device_capability()):
        pytest.skip("needs Hopper and a Triton whose Gluon is known")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def product(x, codes, scales, bias, tiles, out, **options: bool) -> None:
        linear_8bit_gluon(x, codes, scales, bias, tiles, num_sms, out, **options)

    return product


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
def test_hopper_kernels(gluon, code_type):
    """Guards against a ring that is refilled while it is read, and scales of another row, block or run."""
    tolerance = 5e-4 if code_type == checks.FP8 else 1e-5
    check = partial(checks.check_linear_8bit, GPU, code_type, product=gluon, tolerance=tolerance)
    blocked = dict(blocked=True, runs=True)
    check(1, 2048, 4096, Tiles(128, 128, 8, 6, 4), pdl=True)
    check(13, 4096, 2048, Tiles(64, 128, 16, 12, 1), fused=True, pdl=True)
    check(60, 2048, 4096, Tiles(128, 128, 64, 9, 2), biased=True)
    check(3, 2048, 4096, Tiles(128, 128, 8, 11, 2), runs=True)
    check(7, 2048, 4096, Tiles(128, 128, 8, 6, 2, 8), **blocked)
    check(33, 4096, 2048, Tiles(64, 128, 64, 4, 1, 8), fused=True, **blocked)
    check(130, 2048, 4096, Tiles(128, 128, 64, 9, 2), **blocked)


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
def test_hopper_products_of_more_units_than_programs(gluon, code_type):
    """Guards against phases of the ring from the second unit of a program on, when a unit does not fill it."""
    check = partial(checks.check_linear_8bit, GPU, code_type, 9, 40960, 1024, product=gluon, tolerance=5e-4)
    check(Tiles(128, 128, 16, 11, 1), pdl=True)
    check(Tiles(128, 128, 16, 5, 2))
    check(Tiles(128, 128, 16, 6, 1, 8))
    check(Tiles(64, 128, 16, 7, 1), fused=True)


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
def test_a_row_has_the_same_bits_on_hopper_for_any_number_of_rows(gluon, code_type):
    codes, scales, _ = checks.quantised(randn((1024, 4096), torch.float32, GPU, 1), code_type, 1, 4096)
    x_codes, x_scales, _ = checks.quantised(randn((256, 4096), torch.float32, GPU), code_type, 1, 4096)
    results = []
    for rows in (1, 8, 16, 33, 64, 100, 256):
        tile_m = next((size for size in (8, 16, 32) if rows <= size), 64)
        x = CodedRows(x_codes[:rows].contiguous(), x_scales[:rows, 0].contiguous())
        out = poison((2, rows, 1024), torch.float32, GPU)
        gluon(x, codes, scales[:, 0].contiguous(), None, Tiles(128, 128, tile_m, 6, 2), out)
        results.append(out)
    assert all(torch.equal(out, results[-1][:, : out.shape[1]]) for out in results)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.usefixtures("gluon")
def test_int8_prompts_on_hopper(fused):
    """Guards against scales of another row or column, and tiles that reach past the last."""
    from baton.kernels.triton.product_8bit_gluon import product_8bit

    rows, n, k = 1500, 1400, 1024
    wide = 2 * n if fused else n
    x_codes, x_scales, exact_x = checks.quantised(randn((rows, k), torch.float32, GPU), checks.INT8, 1, k)
    codes, scales, weight = checks.quantised(randn((wide, k), torch.float32, GPU, 1) / k**0.5, checks.INT8, 1, k)
    bias = None if fused else randn((n,), BF16, GPU, 2)
    exact = F.linear(exact_x, weight, None if bias is None else bias.double())
    if fused:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    x = CodedRows(x_codes, x_scales[:, 0].contiguous())
    for _ in range(2):
        out = poison((rows, n), BF16, GPU)
        product_8bit(x, codes, scales[:, 0].contiguous(), bias, 20, out, fused=fused)
        assert error(out, exact) <= 2 * error(exact.to(BF16), exact)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_sums_of_one_sign_are_exact(weight_format):
    """Guards against sums that the matrix unit keeps: it cuts off what its 14 bits do not hold, always downwards."""
    o = linear(weight_format, *O_8B[:2])
    o.codes.copy_(o.codes.float().abs().to(o.codes.dtype))
    products = Products(fastest, 512, [shape_of(o)], BF16, GPU)
    for rows in (1, 64, 512):
        x = randn((rows, 4096), BF16, GPU, 7).abs()
        coded = products.codes_for(o, rows) is not None
        exact = (fake(x, weight_format) if coded else x.double()) @ o.dequantised(torch.float64).t()
        out = products(o, x, poison((rows + 4, 4096), BF16, GPU)[:rows], pdl=False)
        assert error(out.double().sum(0) if out.dim() == 3 else out, exact) < 3e-3, rows


@pytest.mark.parametrize("code_type", [checks.FP8, checks.INT8])
@pytest.mark.parametrize("run", [0, 128])
def test_codes(code_type, run):
    """Guards against a GPU's division or rounding that is not the reference's."""
    checks.check_quantise(GPU, code_type, BF16, 300, 4096, run)
    checks.check_norm_in_codes(GPU, code_type, 300, 4096, run)
    checks.check_silu_in_codes(GPU, code_type, 65, 14336, run)
