"""Products with weights of 4 bits, and how these are packed."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.linear.grouped import block_size, pack_codes, unpack_codes
from baton.kernels.triton.gather import gather_columns
from baton.kernels.triton.linear_int4 import quarters, unpacking
from baton.kernels.triton.linear_policy import Tiles
from baton.tests.unit.kernels import int4_checks as checks

GROUPS = [32, 64, 128]


@pytest.mark.parametrize("block", [64, 128, 256])
def test_packed_codes_are_unpacked_as_they_were(block):
    """Guards against a sign that is carried from the highest code of a word."""
    codes = checks.random_codes(7, 512)
    words = torch.empty(7, 128, dtype=torch.int16)
    pack_codes(codes, block, words)
    assert torch.equal(unpack_codes(words, block), codes)


@pytest.mark.parametrize(
    ("num_inputs", "group", "block"),
    [
        (4096, 128, 256),
        (4096, 64, 256),
        (4096, 32, 128),
        (4096, 4096, 256),
        (896, 128, 128),
        (896, 896, 128),
        (96, 96, 32),
        (96, 12, 0),
    ],
)
def test_a_block_holds_whole_groups_or_is_within_one(num_inputs, group, block):
    """Guards against a scale that is applied to the inputs of two groups."""
    assert (block_size(num_inputs, group) or 0) == block


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize(("rows", "fused", "biased", "splits"), [(1, False, True, 2), (20, True, False, 1)])
def test_products(device, group, with_zeros, rows, fused, biased, splits):
    """Guards against codes of another place, scales of another group, and zeros of 16."""
    weight = checks.make_int4(128, 512, group, device, with_zeros)
    checks.check_linear_int4(weight, rows, Tiles(64, 0, 16, 3, splits), fused, biased)


@pytest.mark.parametrize("place", range(4))
def test_instructions_that_unpack_give_codes_less_zeros(place):
    """Guards against a mask, shift or factor of another place. What a GPU does with them is computed here."""
    codes, zeros = torch.meshgrid(torch.arange(16), torch.arange(17), indexing="ij")
    words = codes << 4 * place | (0x5A5A & ~(15 << 4 * place))
    assert torch.equal(_computed(unpacking(place), words, -(128.0 + zeros)), (codes - zeros).float())
    quarter = -zeros / 4 if place % 2 else -(32 + zeros / 4)
    assert torch.equal(_computed(quarters(place), words, quarter), (codes - zeros) / 4)


def _computed(asm: str, words: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """(bfloat16(words >> shift & mask | exponent) * factor + added); words hold 16 bits."""
    shift = int(found[1]) if (found := re.search(r"shr.u32 t, \$1, (\d+)", asm)) else 0
    mask, exponent = (int(each, 16) & 0xFFFF for each in re.search(r" t, t, (\w+)(?:, (\w+), 0xea)?;", asm).groups("0"))
    factor = int(re.search(r"mov.b32 \w+, (0x\w+)", asm)[1], 16) & 0xFFFF

    def number(bits: torch.Tensor) -> torch.Tensor:
        return bits.to(torch.int16).view(torch.bfloat16).float()

    assert torch.equal(added.bfloat16().float(), added.float()), "what is added has no bfloat16"
    return number(words >> shift & mask | exponent) * number(torch.tensor([factor])) + added


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_dtype(device, dtype):
    weight = checks.make_int4(64, 256, 128, device, True, dtype)
    checks.check_linear_int4(weight, 3, Tiles(64, 0, 16, 3, 1))
    checks.check_dequantise_int4(weight)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("with_zeros", [False, True])
def test_dequantised_weights(device, group, with_zeros):
    """Guards against rounding twice."""
    checks.check_dequantise_int4(checks.make_int4(40, 512, group, device, with_zeros))


def test_tiles_for_other_blocks_are_refused(device):
    """Guards against sums over groups that are cut."""
    weight = checks.make_int4(64, 256, 128, device)
    with pytest.raises(ValueError, match="do not divide"):
        checks.check_linear_int4(weight, 1, Tiles(64, 0, 16, 3, 2))


def test_columns_are_gathered(device):
    """Guards against the end of a row that is not a whole block."""
    x = checks.randn((3, 2500), torch.bfloat16, device)
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
    out = torch.full_like(x, float("nan"))
    gather_columns(x, order, out)
    assert torch.equal(out, x[:, order.long()])
