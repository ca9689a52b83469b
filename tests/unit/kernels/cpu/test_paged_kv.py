"""Quantised keys and values in the CPU's pool, against the plain formula."""

import pytest
import torch

from baton import kernels
from baton.kernels import reference
from baton.kernels.cpu.paged_kv import _widen
from baton.kernels.reference import FP8

BLOCKS, KV_HEADS, LAYERS, TOKENS, DIM = 3, 2, 2, 4, 8
GAP = 4 * DIM
"""Bytes behind the data of a layer: the scales of 4 keys and 4 values."""


def make_pool() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The memory, the numbers and the scales in it."""
    layer = 2 * TOKENS * DIM + GAP
    memory = torch.zeros(BLOCKS * KV_HEADS * LAYERS * layer, dtype=torch.uint8)
    shape = (BLOCKS, KV_HEADS, LAYERS, 2, TOKENS, DIM)
    strides = (KV_HEADS * LAYERS * layer, LAYERS * layer, layer, TOKENS * DIM, DIM, 1)
    scale_strides = (*(stride // 4 for stride in strides[:3]), TOKENS, 1)
    scales = memory.view(torch.float32).as_strided(shape[:5], scale_strides, 2 * TOKENS * DIM // 4)
    return memory, memory.view(FP8).as_strided(shape, strides), scales


def piece(block: int, head: int, layer: int) -> int:
    """Of its keys."""
    return ((block * KV_HEADS + head) * LAYERS + layer) * 2


def slots(places: list[tuple[int, int]], layer: int) -> torch.Tensor:
    """int64 [N, 2, KH] of tokens at (block, token)."""
    return torch.tensor(
        [
            [[(piece(block, head, layer) + plane) * TOKENS + token for head in range(KV_HEADS)] for plane in (0, 1)]
            for block, token in places
        ]
    )


PLACES = [(2, 3), (0, 0), (0, 1), (1, 2)]
KV = torch.randn(len(PLACES), 2, KV_HEADS * DIM, generator=torch.Generator().manual_seed(1))
KV[1, 0, :DIM] = 0.0  # a key of zeros has a scale too
KV[2, 1, 3] = 1e5


@pytest.mark.parametrize("static", [None, torch.rand(LAYERS, 2, KV_HEADS) + 0.01], ids=["token", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gathered_is_what_the_formula_says(static, dtype):
    """Guards against the scale of another token, head, layer or plane, and numbers beyond 448 that become NaN."""
    memory, pool, scales = make_pool()
    kv = kernels.QuantisedKv(pool, scales if static is None else None, static, dtype)
    kv.write(slots(PLACES, 1), KV.to(dtype))
    keys = torch.tensor([piece(block, head, 1) for block in (2, 0, 1) for head in (1, 0)])
    found = kv.gather(torch.cat((keys, keys + 1))).view(2, 3, 2, TOKENS, DIM)
    for number, (block, token) in enumerate(PLACES):
        for plane in (0, 1):
            for head in range(KV_HEADS):
                exact = KV[number, plane, head * DIM : (head + 1) * DIM].to(dtype)
                scale = reference.kv_scales(exact) if static is None else static[1, plane, head]
                data = reference.quantise_kv(exact, scale)
                assert torch.equal(pool[block, head, 1, plane, token].float(), data.float())
                plain = reference.dequantise_kv(data, scale)
                assert torch.equal(found[plane, (2, 0, 1).index(block), 1 - head, token], plain.to(dtype))
                if static is None:
                    assert scales[block, head, 1, plane, token] == scale
                    assert (plain - exact.float()).abs().max() <= exact.float().abs().max() / 27.9  # half of 32 / 448
    untouched = memory.view(-1, 2 * TOKENS * DIM + GAP).view(BLOCKS * KV_HEADS, LAYERS, -1)[:, 0]
    assert not untouched.any(), "another layer was written"


def test_all_8_bit_floats_are_widened_exactly():
    """Guards the bits of subnormals and negative numbers; NaN, which no finite number becomes, is left out."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    wide = torch.empty(254)
    _widen(codes.view(torch.int8), wide)
    assert torch.equal(wide, codes.view(FP8).float())
    assert wide.view(torch.int32)[128 - 1] == -(1 << 31), "minus zero"
