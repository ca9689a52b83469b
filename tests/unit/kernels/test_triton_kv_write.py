"""Keys and values, rotated already, into the pool."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import reference
from baton.kernels.triton.kv_write import kv_write
from baton.tests.unit.kernels.kernel_checks import Heads, QuantisedPool, make_pool, randn

LAYERS, LAYER, BLOCK = 3, 1, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kv_heads", "key_dim", "value_dim", "dim"), [(2, 64, 64, 64), (6, 24, 12, 32), (1, 192, 128, 192)]
)
def test_what_is_written_is_what_was_given(device, dtype, kv_heads, key_dim, value_dim, dim):
    """Guards every bit, the zeros behind narrower heads, padding, the slots of others, and heads that lie apart."""
    rows, blocks = 5, 3
    key = randn((kv_heads, rows, key_dim), dtype, device, 1).transpose(0, 1)  # as models bring them
    value = randn((kv_heads, rows, value_dim), dtype, device, 2).transpose(0, 1)
    slots = torch.randperm(blocks * BLOCK, generator=torch.Generator().manual_seed(3))[:rows].int().to(device)
    slots[-1] = -1
    paged = make_pool(blocks, LAYERS, BLOCK, Heads(kv_heads, kv_heads, dim), dtype, device, 4)
    expected = paged.tensor.clone()
    for row, slot in enumerate(slots[:-1].tolist()):
        for plane, given in enumerate((key, value)):
            place = expected[slot // BLOCK, :, LAYER, plane, slot % BLOCK]
            place[:] = 0
            place[:, : given.shape[2]] = given[row]
    kv_write(key, value, slots, paged, LAYER)
    assert torch.equal(paged.tensor, expected)


def test_numbers_with_scales_are_quantised_as_by_the_reference(device):
    rows, heads = 3, Heads(2, 2, 32)
    made = QuantisedPool.make(2, LAYERS, BLOCK, heads, "token", device, 5)
    key, value = (randn((rows, 2, 32), torch.float32, device, seed) for seed in (6, 7))
    slots = torch.tensor([3, 20, 9], dtype=torch.int32, device=device)
    kv_write(key, value, slots, made.pool, LAYER)
    for row, slot in enumerate(slots.tolist()):
        for plane, given in enumerate((key, value)):
            place = (slot // BLOCK, slice(None), LAYER, plane, slot % BLOCK)
            used = made.scales[place]
            torch.testing.assert_close(used, reference.kv_scales(given[row]), rtol=1e-5, atol=0)
            assert torch.equal(made.pool.tensor[place].float(), reference.quantise_kv(given[row], used).float())
