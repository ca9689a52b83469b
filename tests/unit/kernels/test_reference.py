"""The small ops against the formulas in their docstrings, written out in numpy with float64."""

import numpy as np
import pytest
import torch

from baton import kernels


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (3, 4, 16)])
def test_rms_norm(generator, dtype, shape):
    """Guards against an epsilon outside the root, and against sums in bfloat16."""
    x = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    weight = torch.randn(shape[1:], generator=generator).to(dtype)
    exact = x.double().numpy()
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight.double().numpy()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(kernels.rms_norm(x, weight, 1e-5).double().numpy(), expected, rtol=tolerance, atol=1e-6)


def test_add_rms_norm_gives_the_sum_back(generator):
    """Guards against a residual that the next layer does not see."""
    x, residual = torch.randn(2, 3, 8, generator=generator)
    total = x + residual
    weight = torch.randn(8, generator=generator)
    normed, kept = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(kept, total)
    assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-6))


def test_rope_turns_pairs_of_halves(generator):
    """Guards against the other pairing of elements (neighbours), which other checkpoints use."""
    x, angles = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 4, generator=generator)
    pairs = x[..., :4].numpy().astype(complex) + 1j * x[..., 4:].numpy()
    turned = pairs * np.exp(1j * angles.numpy().astype(np.float64))[:, None]
    cos, sin = angles.cos(), angles.sin()
    kernels.apply_rope(x, torch.stack((cos, cos), 1)[:, None], torch.stack((-sin, sin), 1)[:, None])
    np.testing.assert_allclose(x.numpy(), np.concatenate((turned.real, turned.imag), -1), atol=1e-6)


def test_silu_and_mul(generator):
    """Guards against gate and up being exchanged."""
    gate_up = torch.randn(3, 14, generator=generator) * 4
    gate, up = np.split(gate_up.double().numpy(), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(kernels.silu_and_mul(gate_up).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 33, 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size_in", "size_out"), [(48, 80), (129, 7)])
def test_packed_linear_equals_the_plain_product(generator, rows, bias, size_in, size_out):
    """Guards against a packed weight that is wrong for another number of rows than it was planned for."""
    weight = torch.randn(size_out, size_in, generator=generator)
    offset = torch.randn(size_out, generator=generator) if bias else None
    x = torch.randn(rows, size_in, generator=generator)
    expected = x.double() @ weight.double().T + (offset.double() if offset is not None else 0)
    linear = kernels.DenseLinear(weight.clone(), offset)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)
    linear.pack()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_packing_frees_the_plain_weight_unless_it_is_kept(generator):
    """Guards against a model that takes twice its memory."""
    weight = torch.randn(8, 8, generator=generator)
    linear, kept = kernels.DenseLinear(weight.clone()), kernels.DenseLinear(weight)
    linear.pack()
    kept.pack(keep_weight=True)
    assert kept.weight is weight
    assert linear.weight.numel() == (0 if torch.backends.mkldnn.is_available() else 64)
