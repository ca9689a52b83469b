"""The small fused kernels of a layer: norm and activation."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import reference
from baton.kernels.triton import activation, norm
from baton.kernels.triton.whole_norm import whole_norm
from baton.tests.unit.kernels import kernel_checks as checks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 896), (2, 1100)])
def test_rms_norm(device, dtype, rows, width):
    """Guards against columns past an odd width in the mean, and rows exchanged."""
    checks.check_rms_norm(device, dtype, rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partials", [0, 1, 2, 4])
def test_add_rms_norm(device, dtype, partials):
    """Guards against a partial sum left out, and a residual that is not rounded before it is normed."""
    checks.check_add_rms_norm(device, dtype, 3, 200, partials)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partials", [0, 2])
def test_the_norm_of_what_is_added(device, dtype, partials):
    """Guards against columns past an odd width in the inner mean, and weights exchanged."""
    checks.check_add_rms_norm(device, dtype, 3, 200, partials, output=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 1000), (2, 2500)])
def test_silu_and_mul(device, dtype, rows, width):
    """Guards against gate and up exchanged and a last block that is cut off."""
    checks.check_silu_and_mul(device, dtype, rows, width)


def test_wrong_shapes_are_refused(device):
    """Guards against a kernel that reads or writes past the end of what it was given."""
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="does not fit"):
        norm.rms_norm(x, x[0], 1e-5, torch.zeros(3, 8, device=device))
    with pytest.raises(ValueError, match="contiguous"):
        norm.rms_norm(x.t(), x[:, 0].contiguous(), 1e-5, torch.zeros(8, 2, device=device))
    with pytest.raises(ValueError, match="twice"):
        activation.silu_and_mul(x, torch.zeros(2, 8, device=device))


@pytest.mark.parametrize("partials", [0, 2])
def test_norms_of_all_heads_together(device, partials):
    """Guards against keys that are normed with queries, values that are normed too, and parts left out of the sum."""
    parts = checks.randn((partials or 1, 5, 24 + 2 * 8), torch.float32, device)
    weights = checks.randn((24,), torch.float32, device, 1), checks.randn((8,), torch.float32, device, 2)
    out = checks.poison((5, 40), torch.float32, device)
    whole_norm(parts if partials else parts[0], *weights, 1e-5, out)
    query, key, value = parts.sum(0).split((24, 8, 8), -1)
    exact = torch.cat(
        [reference.rms_norm(query, weights[0], 1e-5), reference.rms_norm(key, weights[1], 1e-5), value], 1
    )
    torch.testing.assert_close(out, exact)
