"""Keys and values of 8-bit floats: the write into the pool, and attention over it."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.pool import PagedPool
from baton.tests.unit.kernels import kernel_checks as checks

WHOLE, PIECES, SHARED = (
    DecodePlan(5, 3, chunk_tokens=256),
    DecodePlan(9, 3, chunk_tokens=64),
    DecodePlan(30, 3, splits=4),
)
RAGGED = [(40, 0), (1, 70), (17, 50), (32, 64)]  # new tokens, cached tokens
BF16 = torch.bfloat16


@pytest.mark.parametrize("scales", ["token", "static"])
@pytest.mark.parametrize(("heads", "block_tokens"), [((4, 2, 16), 16), ((6, 2, 96), 64), ((8, 4, 128), 64)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_write(device, scales, heads, block_tokens, dtype):
    """Guards against scales of another token or head, scales that lie over data, and numbers that become NaN."""
    checks.check_quantised_write(device, dtype, checks.Heads(*heads), 5, block_tokens, scales)


@pytest.mark.parametrize("scales", ["token", "static"])
@pytest.mark.parametrize("plan", [WHOLE, PIECES, SHARED])
@pytest.mark.parametrize("window", [None, 40])
def test_decode_by_words(device, scales, plan, window):
    """Guards against bytes of words exchanged, a power of two that is left in, and tokens past the end that count."""
    checks.check_decode_attention(device, BF16, checks.Heads(4, 2, 128), [1, 64, 150], 64, plan, window, scales=scales)


@pytest.mark.parametrize(
    ("heads", "block_tokens", "dtype"),
    [
        ((5, 1, 64), 128, BF16),
        ((16, 1, 256), 64, BF16),
        ((5, 1, 80), 64, BF16),
        ((8, 2, 96), 32, BF16),
        ((4, 2, 128), 16, BF16),
        ((4, 2, 128), 64, torch.float32),
        ((4, 2, 32), 64, BF16),
    ],
)
@pytest.mark.parametrize("scales", ["token", "static"])
def test_decode_of_other_shapes(device, heads, block_tokens, dtype, scales):
    """Guards both kernels against heads and pages that they were not tuned for."""
    checks.check_decode_attention(device, dtype, checks.Heads(*heads), [70, 129], block_tokens, PIECES, scales=scales)


@pytest.mark.parametrize("scales", ["token", "static"])
@pytest.mark.parametrize(("heads", "block_tokens"), [((2, 1, 32), 16), ((4, 2, 128), 64), ((3, 1, 80), 32)])
@pytest.mark.parametrize("window", [None, 20])
def test_prefill(device, scales, heads, block_tokens, window):
    """Guards against scales of other tokens than the tile's, on the diagonal and before it."""
    checks.check_prefill_attention(device, BF16, checks.Heads(*heads), RAGGED, block_tokens, 32, window, scales=scales)


@pytest.mark.parametrize("scales", ["token", "static"])
@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_widened_context(device, scales, block_tokens, dtype):
    """Guards against blocks and tables of another sequence, and scales of values for keys."""
    checks.check_widened_context(device, dtype, checks.Heads(4, 2, 32), [70, 0, 1, 200], block_tokens, scales)


def test_chunks_do_not_matter(device):
    """Guards the promise that a prefix from a cache changes no bit."""
    checks.check_chunks_do_not_matter(device, BF16, checks.Heads(2, 1, 64), 64, 32, "token")


def test_pools_whose_scales_lie_elsewhere_are_refused(device):
    """Guards memory that is not the pool's: kernels compute where a scale is, and check nothing."""
    made = checks.QuantisedPool.make(3, 2, 16, checks.Heads(2, 2, 32), "token", "cpu", 1)
    data, scales = made.pool.tensor, made.scales
    for wrong in (None, scales.contiguous(), scales[:, :, :1], scales.double(), torch.ones(2, 2, 1)):
        with pytest.raises(ValueError):
            PagedPool.of(data, wrong)
    with pytest.raises(ValueError):
        PagedPool.of(data.float(), scales)
