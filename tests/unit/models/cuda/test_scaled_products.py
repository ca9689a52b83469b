"""Products with weights of 8 bits as a step asks for them: by rows in codes, whose reference is a fake-quantised x."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import ScaledLinear, reference
from baton.kernels.triton.norm import rms_norm
from baton.models.cuda.products import Products, fastest, invariant, shape_of
from baton.models.cuda.products.scaled_many import ScaledManyRows
from baton.tests.unit.kernels import interpreter_bf16

if not torch.cuda.is_available():
    interpreter_bf16.install()  # rounds to FP8 as a GPU does

FORMATS = {
    "fp8_row": (torch.float8_e4m3fn, (1, 256)),
    "int8_row": (torch.int8, (1, 256)),
    "fp8_block": (torch.float8_e4m3fn, (128, 128)),
}


def linear(weight_format: str, outputs: int, biased: bool = False) -> ScaledLinear:
    """Of 256 inputs."""
    code_type, (rows, columns) = FORMATS[weight_format]
    generator = torch.Generator().manual_seed(outputs)
    codes = (40 * torch.randn(outputs, 256, generator=generator)).clamp(-127, 127).to(code_type)
    scales = torch.rand(outputs // rows, 256 // columns, generator=generator) / 500
    bias = torch.randn(outputs, generator=generator) if biased else None
    return ScaledLinear(codes, scales.flatten() if rows == 1 else scales, rows, columns, bias)


def products_of(*weights: ScaledLinear, gate_up: ScaledLinear, policy=fastest) -> Products:
    shapes = [shape_of(each) for each in weights] + [shape_of(gate_up, fused=True)]
    return Products(policy, 20, shapes, torch.float32, "cpu")


def fake(x: torch.Tensor, weight_format: str) -> torch.Tensor:
    """What codes of x stand for."""
    width = 128 if weight_format == "fp8_block" else x.shape[1]
    codes, scales = reference.quantise(x, FORMATS[weight_format][0], width)
    return codes.float() * scales.t().repeat_interleave(width, 1)


def whole(parts: torch.Tensor) -> torch.Tensor:
    return parts.sum(0) if parts.dim() == 3 else parts


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rows", [1, 19])
def test_products_are_those_of_rows_in_codes(weight_format, rows):
    """Guards against codes of other rows, and rows that are put into codes with the scales of another format."""
    down, gate_up = linear(weight_format, 128, biased=True), linear(weight_format, 512)
    products = products_of(down, gate_up=gate_up)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    x[0, :128] = 0.0
    expected = down(fake(x, weight_format))
    torch.testing.assert_close(whole(products(down, x, torch.empty(rows, 128), pdl=False)), expected)
    out = torch.empty(rows, 128)
    products.whole(down, x, out, pdl=False)
    torch.testing.assert_close(out, expected)
    gate, up = gate_up(fake(x, weight_format)).chunk(2, -1)
    gated = products.gated(gate_up, x, torch.empty(rows, 256), down, pdl=False)
    assert isinstance(gated, torch.Tensor)
    torch.testing.assert_close(gated, F.silu(gate) * up)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_norm_writes_the_codes_that_its_reader_multiplies(weight_format):
    """Guards against a norm in one layout of scales whose reader takes another."""
    qkv, gate_up = linear(weight_format, 128), linear(weight_format, 512)
    products = products_of(qkv, gate_up=gate_up)
    x, weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), torch.ones(256)
    for reader in (qkv, gate_up):
        codes = products.codes_for(reader, 5)
        assert codes is not None
        rms_norm(x, weight, 1e-5, codes)
        out = torch.empty(5, reader.num_outputs)
        products.whole(reader, codes, out, pdl=False)
        expected = reader(fake(reference.rms_norm(x, weight, 1e-5), weight_format))
        assert (out - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_deterministic_row_does_not_depend_on_the_others(weight_format):
    """Guards against other kernels, or other parts of a sum, for other numbers of rows."""
    down, gate_up = linear(weight_format, 128), linear(weight_format, 512)
    products = products_of(down, gate_up=gate_up, policy=invariant)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    for weights in (down, gate_up):
        found = [
            whole(products(weights, x[:rows], torch.empty(rows, weights.num_outputs), pdl=False))[:1]
            for rows in (1, 20)
        ]
        assert torch.equal(*found)
    gated = [products.gated(gate_up, x[:rows], torch.empty(rows, 256), down, pdl=False)[:1].clone() for rows in (1, 20)]
    assert torch.equal(*gated)


def test_what_no_kernel_cuts_is_dequantised():
    """Guards against a step that fails for a model of odd sizes."""
    odd, gate_up = linear("fp8_row", 40), linear("fp8_row", 80)
    products = products_of(odd, gate_up=gate_up)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert products.codes_for(odd, 3) is None
    torch.testing.assert_close(products(odd, x, torch.empty(3, 40), pdl=False), odd(x))


@pytest.mark.parametrize(("weight_format", "fits"), [("fp8_block", False), ("fp8_row", True)])
def test_rows_are_in_codes_only_if_runs_divide_them(monkeypatch, weight_format, fits):
    """Guards the start of a worker on Hopper, of DeepSeek-V2-Lite in fp8_block: 10,944 inputs are no whole runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    many = ScaledManyRows(weight_format, False, torch.bfloat16, "cuda:0")
    assert many.fits(2048, 10944) is fits
    assert many.fits(2048, 10240)


@pytest.mark.parametrize(("weight_format", "fits"), [("fp8_block", False), ("fp8_row", True)])
@pytest.mark.parametrize("num_inputs", [384, 8960])
def test_cublas_gets_no_scales_that_it_reads_as_others(monkeypatch, weight_format, num_inputs, fits):
    """Guards against results that are silently wrong, and against what lies behind the scales, where 128 outputs have a
    number of scales that is no multiple of four: a rank's part of a narrow model, and Qwen2.5-1.5B."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ScaledManyRows(weight_format, False, torch.bfloat16, "cuda:0").fits(256, num_inputs) is fits
