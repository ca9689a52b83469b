"""kvtransfer.blocks.digest: the digest computed on the device, here with Triton's interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import xxhash  # noqa: E402

from baton.kvtransfer.blocks.checksum import digest_of_sums, sum64, unit_checksums  # noqa: E402
from baton.kvtransfer.blocks.digest import BlockDigests, Checksums, SumsBehind  # noqa: E402
from baton.node.errors import InvariantBroken  # noqa: E402

WORDS, UNITS = 37, 3


def blocks(count: int = 5) -> torch.Tensor:
    data = bytearray(random.Random(1).randbytes(count * UNITS * WORDS * 8))
    return torch.frombuffer(data, dtype=torch.uint8).view(count, UNITS, WORDS * 8)


def test_it_equals_the_definition() -> None:
    """Guards against ends of a transfer that compute different digests on different devices."""
    data = blocks()
    expected = xxhash.xxh3_128(unit_checksums(data[[3, 0]].flatten(0, 1).numpy()).tobytes())
    assert BlockDigests(data).digest([3, 0]) == expected.digest()


def test_every_changed_bit_and_every_swap_shows() -> None:
    data = blocks(2)
    digests = BlockDigests(data)
    before = digests.digest([1])
    for place in range(0, UNITS * WORDS * 8, 13):  # each bit of a byte, in each unit
        unit, position = divmod(place, WORDS * 8)
        data[1, unit, position] ^= 1 << place % 8
        assert digests.digest([1]) != before
        data[1, unit, position] ^= 1 << place % 8
    words = data[1, 2].view(torch.int64)
    words[[2, 30]] = words[[30, 2]]
    assert digests.digest([1]) != before
    words[[2, 30]] = words[[30, 2]]
    data[1, [0, 2]] = data[1, [2, 0]]
    assert digests.digest([1]) != before, "units swapped"


def test_the_order_and_the_number_of_blocks_count() -> None:
    digests = BlockDigests(blocks())
    seen = {digests.digest(chunk) for chunk in ([0, 1], [1, 0], [0], [0, 1, 1], [0, 0])}
    assert len(seen) == 5
    assert all(len(digest) == 16 for digest in seen)


def test_more_blocks_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockDigests, "MAX_BLOCKS", 4)
    data = blocks()
    many = [i % 5 for i in range(11)]
    expected = xxhash.xxh3_128(unit_checksums(data[many].flatten(0, 1).numpy()).tobytes())
    assert BlockDigests(data).digest(many) == expected.digest()


def test_several_chunks_at_once_have_their_own_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an Offer against the digest of another chunk of the same launch, at the bound of a launch too."""
    monkeypatch.setattr(BlockDigests, "MAX_BLOCKS", 3)
    digests, chunks = BlockDigests(blocks()), ([3, 0], [], [1, 4], [2])
    assert digests.digests(chunks) == [digests.digest(chunk) for chunk in chunks]
    assert digests.digests([]) == []


def test_each_single_block_has_the_hosts_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards verification by the host's store, which computes the digests of blocks that a GPU has put."""
    monkeypatch.setattr(BlockDigests, "MAX_BLOCKS", 3)
    data = blocks()
    chosen = [4, 0, 2, 2, 1, 3, 0]
    assert BlockDigests(data).each(chosen) == [sum64(memoryview(data[block].numpy()), UNITS) for block in chosen]
    assert BlockDigests(data).each([3]) == [BlockDigests(data).digest([3])]


@pytest.mark.parametrize("block", [-1, 5])
def test_a_block_out_of_the_pool_is_refused(block: int) -> None:
    with pytest.raises(InvariantBroken):
        BlockDigests(blocks()).digest([0, block])


class Line:
    """A device queue that runs its work when a mark behind it is waited for."""

    def __init__(self) -> None:
        self.works: list[Callable[[], None]] = []

    def wait(self) -> None:
        for work in self.works:
            work()
        self.works.clear()

    def mark(self) -> Line:
        return self


def test_sums_behind_a_step_are_those_of_what_it_wrote() -> None:
    """Guards the digest that the receiver will compute, and the buffers, which are freed by reads."""
    data, line = blocks(), Line()
    sums = SumsBehind(data, 3, 2, line.works.append, line.mark)
    for turn in range(3):
        read = sums.begin([4, 1])
        line.works.insert(0, lambda turn=turn: data[4].fill_(turn))
        found = read()
        assert digest_of_sums([found[4], found[1]]) == BlockDigests(data).digest([4, 1])


def test_sums_behind_a_step_are_left_out_without_room() -> None:
    line = Line()
    sums = SumsBehind(blocks(), 3, 1, line.works.append, line.mark)
    assert sums.begin([0, 1, 2, 3])() == {} and sums.begin([])() == {}
    first, second = sums.begin([0]), sums.begin([1])
    assert second() == {} and [*first()] == [0] and [*sums.begin([1])()] == [1]


def test_checksums_are_one_digest_too() -> None:
    data = blocks()
    checksums = Checksums(data, 4)
    checksums.launch([3, 0])
    assert checksums.digest() == BlockDigests(data).digest([3, 0])
