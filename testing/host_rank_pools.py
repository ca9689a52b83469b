"""The pools of the ranks of one worker in host memory: block b of it is the blocks b of all, each with its own units.

What kvtransfer.blocks.rank_pools is on GPUs, for tests of what ranks exchange. Copies of a unit are summed up each, and
one that differs from the others makes a digest that fits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.kvtransfer.blocks.checksum import digest_of_sums, xxh3_sums
from baton.kvtransfer.blocks.memory import SharedBlockMemory, SharedFile
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.reshard import Cut


class HostUnitMemory:
    """A rank's pool with its units as blocks: unit u of block b is number b * units + u. Meets SharedBlockMemory."""

    num_units = 1

    def __init__(self, memory: SharedBlockMemory) -> None:
        self._memory = memory
        self.units_per_block = memory.num_units
        self.num_blocks = memory.num_blocks * memory.num_units
        self.block_bytes = memory.block_bytes // memory.num_units

    @property
    def shared(self) -> SharedFile | None:
        return self._memory.shared

    def block(self, index: int) -> memoryview:
        """The writable bytes of one unit."""
        block, unit = divmod(index, self.units_per_block)
        return self._memory.block(block)[unit * self.block_bytes : (unit + 1) * self.block_bytes]


class HostRankPools:
    """`pools` of the ranks in order, as `cut` shares out the units; one stage."""

    def __init__(self, cut: Cut, pools: Sequence[BlockPool]) -> None:
        held = [(pool.layout.first_unit, pool.num_units) for pool in pools]
        if held != [(cut.units(rank).start, len(cut.units(rank))) for rank in range(cut.ranks)]:
            raise ValueError(f"ranks with (first unit, units) {held}, cut for {cut.ranks} of {cut.total_units} units")
        if len({pool.num_blocks for pool in pools}) != 1:
            raise ValueError(f"pools of {[pool.num_blocks for pool in pools]} blocks")
        self.cut, self.pools = cut, tuple(pools)
        self.num_blocks = pools[0].num_blocks
        self.memories = [HostUnitMemory(pool) for pool in pools]

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """The digest ("xxh3") of each of these chunks."""
        return [
            digest_of_sums(self._sum(block, unit) for block in chunk for unit in range(self.cut.total_units))
            for chunk in chunks
        ]

    def close(self) -> None:
        for pool in self.pools:
            pool.close()

    def _sum(self, block: int, unit: int) -> bytes:
        sums = []
        for rank in self.cut.holders(unit):
            memory = self.memories[rank]
            number = block * memory.units_per_block + unit - self.cut.units(rank).start
            sums.append(xxh3_sums(memory.block(number), 1))
        return sums[0] if len(set(sums)) == 1 else b"".join(sums)
