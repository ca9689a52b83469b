"""Guards the digest that is computed on the device, here on CPU tensors: any kernel that replaces it must agree."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
import xxhash  # noqa: E402

from kvtransfer.blocks.digest import BlockDigests, weights  # noqa: E402
from node.errors import InvariantBroken  # noqa: E402

MASK = (1 << 64) - 1
WORDS = 37


def splitmix(index: int) -> int:
    z = ((index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) | 1


def blocks(count: int = 5) -> torch.Tensor:
    data = bytearray(random.Random(1).randbytes(count * WORDS * 8))
    return torch.frombuffer(data, dtype=torch.uint8).view(count, WORDS * 8)


def test_it_is_what_the_formula_says() -> None:
    """In Python's integers: 64-bit torch has no logical shift and only signed products."""
    data = blocks()
    expected = xxhash.xxh3_128()
    for block in (3, 0):
        words = data[block].view(torch.int64).tolist()
        checksum = sum((word & MASK) * splitmix(i) for i, word in enumerate(words)) & MASK
        expected.update(checksum.to_bytes(8, "little"))
    assert BlockDigests(data).digest([3, 0]) == expected.digest()


def test_every_changed_bit_and_every_swap_shows() -> None:
    data = blocks(2)
    digests = BlockDigests(data)
    before = digests.digest([1])
    for position in range(0, WORDS * 8, 11):
        for bit in range(8):
            data[1, position] ^= 1 << bit
            assert digests.digest([1]) != before
            data[1, position] ^= 1 << bit
    words = data[1].view(torch.int64)
    words[[2, 30]] = words[[30, 2]]
    assert digests.digest([1]) != before


def test_the_order_and_the_number_of_blocks_count() -> None:
    digests = BlockDigests(blocks())
    seen = {digests.digest(chunk) for chunk in ([0, 1], [1, 0], [0], [0, 1, 1], [0, 0])}
    assert len(seen) == 5
    assert all(len(digest) == 16 for digest in seen)


def test_more_blocks_than_one_readback_holds() -> None:
    data = blocks()
    many = [i % 5 for i in range(BlockDigests.MAX_BLOCKS + 3)]
    digests = BlockDigests(data)
    altered = [*many[:-1], (many[-1] + 1) % 5]
    assert digests.digest(many) != digests.digest(altered)


@pytest.mark.parametrize("block", [-1, 5])
def test_a_block_out_of_the_pool_is_refused(block: int) -> None:
    with pytest.raises(InvariantBroken):
        BlockDigests(blocks()).digest([0, block])


def test_weights_are_odd_and_differ() -> None:
    found = weights(10_000)
    assert bool((found & 1).all()) and len(set(found.tolist())) == 10_000
