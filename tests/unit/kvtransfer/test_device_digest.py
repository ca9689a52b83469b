"""Guards the digest that is computed on the device, here by the same kernel in Triton's interpreter."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import xxhash  # noqa: E402

from kvtransfer.blocks.checksum import block_checksums, sum64  # noqa: E402
from kvtransfer.blocks.digest import BlockDigests  # noqa: E402
from node.errors import InvariantBroken  # noqa: E402

WORDS = 37


def blocks(count: int = 5) -> torch.Tensor:
    data = bytearray(random.Random(1).randbytes(count * WORDS * 8))
    return torch.frombuffer(data, dtype=torch.uint8).view(count, WORDS * 8)


def test_it_is_what_the_definition_says() -> None:
    """Both ends of a transfer must agree on it, whatever computes it there."""
    data = blocks()
    expected = xxhash.xxh3_128(block_checksums(data[[3, 0]].numpy()).tobytes())
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


def test_more_blocks_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockDigests, "MAX_BLOCKS", 4)
    data = blocks()
    many = [i % 5 for i in range(11)]
    expected = xxhash.xxh3_128(block_checksums(data[many].numpy()).tobytes())
    assert BlockDigests(data).digest(many) == expected.digest()


def test_several_chunks_at_once_have_their_own_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an Offer against the digest of another chunk of the same launch, at the bound of a launch too."""
    monkeypatch.setattr(BlockDigests, "MAX_BLOCKS", 3)
    digests, chunks = BlockDigests(blocks()), ([3, 0], [], [1, 4], [2])
    assert digests.digests(chunks) == [digests.digest(chunk) for chunk in chunks]
    assert digests.digests([]) == []


def test_each_block_alone_has_the_digest_that_a_host_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's store looks at blocks that a GPU has put, and must find the same."""
    monkeypatch.setattr(BlockDigests, "MAX_BLOCKS", 3)
    data = blocks()
    chosen = [4, 0, 2, 2, 1, 3, 0]
    assert BlockDigests(data).each(chosen) == [sum64(memoryview(data[block].numpy())) for block in chosen]
    assert BlockDigests(data).each([3]) == [BlockDigests(data).digest([3])]


@pytest.mark.parametrize("block", [-1, 5])
def test_a_block_out_of_the_pool_is_refused(block: int) -> None:
    with pytest.raises(InvariantBroken):
        BlockDigests(blocks()).digest([0, block])
