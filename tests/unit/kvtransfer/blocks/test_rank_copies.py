"""Records of the host's store that several pools have a part of each: the same for every number of ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from baton.kvtransfer.blocks.checksum import sum64, unit_checksums
from baton.kvtransfer.blocks.copies import Copies, Lock, NoLock, Pair
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.blocks.rank_copies import RankCopies
from baton.kvtransfer.reshard import Cut

UNITS, UNIT_BYTES, BLOCKS = 4, 24, 3


class RankPool:
    """A rank's pool, and its copies: each has ended when it is asked for the second time."""

    batch_blocks = 2

    def __init__(self, num_units: int) -> None:
        self.block_bytes = num_units * UNIT_BYTES
        self.memory = HostMemory(BLOCKS, self.block_bytes, num_units)
        self.num_begun = self.num_closed = 0
        self._asked: set[int] = set()
        self._blocks: dict[int, list[int]] = {}

    def lock(self, memory: memoryview) -> Lock:
        return NoLock()

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        for block, span in pairs:
            self.memory.block(block)[:] = span
        return self._begin(pairs)

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        for block, span in pairs:
            span[:] = self.memory.block(block)
        return self._begin(pairs)

    def unit_sums(self, copy: int) -> bytes | None:
        if copy not in self._asked:
            self._asked.add(copy)
            return None
        units = [bytes(self.memory.block(block)) for block in self._blocks.pop(copy)]
        return b"".join(_sums(block) for block in units)

    def close(self) -> None:
        self.num_closed += 1

    def _begin(self, pairs: Sequence[Pair]) -> int:
        self.num_begun += 1
        self._blocks[self.num_begun] = [block for block, _ in pairs]
        return self.num_begun


def _sums(block: bytes) -> bytes:
    return unit_checksums(np.frombuffer(block, np.uint8).reshape(-1, UNIT_BYTES)).astype("<u8").tobytes()


def made(count: int) -> tuple[RankCopies, list[RankPool]]:
    cut = Cut.even(UNITS, count, 1)
    pools = [RankPool(len(cut.units(rank))) for rank in range(count)]
    return RankCopies(pools, cut), pools


def ended(copies: Copies, copy: int) -> list[bytes]:
    assert copies.ended(copy) is None, "no rank's part has ended"
    digests = copies.ended(copy)
    assert digests is not None
    return digests


@pytest.mark.parametrize(("wrote", "reads"), [(2, 4), (4, 1), (1, 8), (8, 2)])
def test_what_ranks_of_one_number_wrote_ranks_of_another_read(wrote, reads):
    """Guards against units of a record in the order of ranks, heads that several ranks hold, and a digest that is not
    that of the record."""
    arena, generator = HostMemory(BLOCKS, UNITS * UNIT_BYTES, UNITS), random.Random(wrote)
    content = {block: generator.randbytes(UNITS * UNIT_BYTES) for block in range(BLOCKS)}
    cut = Cut.even(UNITS, wrote, 1)
    copies, pools = made(wrote)
    for rank, pool in enumerate(pools):
        units = cut.units(rank)
        for block in range(BLOCKS):
            pool.memory.block(block)[:] = content[block][units.start * UNIT_BYTES : units.stop * UNIT_BYTES]
    expected = {block: sum64(memoryview(content[block]), UNITS) for block in content}
    save = copies.begin_save([Pair(2, arena.block(0)), Pair(1, arena.block(2))])
    assert ended(copies, save) == [expected[2], expected[1]]
    assert bytes(arena.block(0)) == content[2] and bytes(arena.block(2)) == content[1]

    others, pools = made(reads)
    assert (others.block_bytes, others.num_units, others.digest) == (copies.block_bytes, UNITS, copies.digest)
    load = others.begin_load([Pair(0, arena.block(2)), Pair(1, arena.block(0))])
    assert ended(others, load) == [expected[1], expected[2]]
    for rank, pool in enumerate(pools):
        units = Cut.even(UNITS, reads, 1).units(rank)
        part = slice(units.start * UNIT_BYTES, units.stop * UNIT_BYTES)
        assert [bytes(pool.memory.block(block)) for block in (0, 1)] == [content[1][part], content[2][part]]
    others.close()
    assert [pool.num_closed for pool in pools] == [1] * reads


def test_a_copy_of_a_head_that_arrived_wrong_has_no_digest_of_a_block():
    """Guards against ranks that hold other bytes of one head, where the digest is of the first rank's alone."""
    copies, pools = made(8)
    arena = HostMemory(1, copies.block_bytes, UNITS)
    load = copies.begin_load([Pair(0, arena.block(0))])
    pools[5].memory.block(0)[3] ^= 1
    assert ended(copies, load) != [sum64(arena.block(0), UNITS)]
