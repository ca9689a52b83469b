"""Copies between the pools of all ranks of a worker and the arena of the host's store, as if they were one pool.

A record has the units of the model in their order. Each rank copies those of its heads, which lie together in it: so
what ranks of one number wrote ranks of another read. A unit that several ranks hold is saved by the first of them, and
loaded by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from baton.kvtransfer.blocks.checksum import WORD_BYTES, digest_of_sums
from baton.kvtransfer.blocks.copies import Lock, Pair
from baton.kvtransfer.reshard import Cut
from baton.node.messages.store import DigestName


class UnitCopies(Protocol):
    """A rank's, as `Copies` but for what they say when a copy has ended."""

    block_bytes: int
    batch_blocks: int

    def lock(self, memory: memoryview) -> Lock: ...

    def begin_load(self, pairs: Sequence[Pair]) -> int: ...

    def begin_save(self, pairs: Sequence[Pair]) -> int: ...

    def unit_sums(self, copy: int) -> bytes | None:
        """Checksums of the units of its blocks, WORD_BYTES each, block by block; None: it has not ended."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _RunningCopy:
    num_blocks: int
    left: dict[int, int]
    """Ranks, and their numbers of the copy."""
    sums: dict[int, bytes] = field(default_factory=dict)


class RankCopies:
    """`ranks`: in order, of pools over the units that `cut` gives them. Meets Copies."""

    def __init__(self, ranks: Sequence[UnitCopies], cut: Cut) -> None:
        self._ranks, self._cut = ranks, cut
        self._unit_bytes = ranks[0].block_bytes // len(cut.units(0))
        self.block_bytes = self._unit_bytes * cut.total_units
        self.num_units = cut.total_units
        self.batch_blocks = min(rank.batch_blocks for rank in ranks)
        self.digest: DigestName = "sum64"
        self._savers = sorted({cut.holders(unit).start for unit in range(cut.total_units)})
        self._numbers = 0
        self._running: dict[int, _RunningCopy] = {}

    def lock(self, memory: memoryview) -> Lock:
        """By one rank, for the GPUs of all."""
        return self._ranks[0].lock(memory)

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        ranks = range(len(self._ranks))
        return self._begin(len(pairs), {rank: self._ranks[rank].begin_load(self._part(rank, pairs)) for rank in ranks})

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        begun = {rank: self._ranks[rank].begin_save(self._part(rank, pairs)) for rank in self._savers}
        return self._begin(len(pairs), begun)

    def ended(self, copy: int) -> list[bytes] | None:
        running = self._running[copy]
        for rank, number in list(running.left.items()):
            sums = self._ranks[rank].unit_sums(number)
            if sums is not None:
                running.sums[rank] = sums
                del running.left[rank]
        if running.left:
            return None
        del self._running[copy]
        return self._digests(running)

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._running.clear()

    def _part(self, rank: int, pairs: Sequence[Pair]) -> list[Pair]:
        """The rank's blocks, and its units of the records."""
        units = self._cut.units(rank)
        part = slice(units.start * self._unit_bytes, units.stop * self._unit_bytes)
        return [Pair(block, span[part]) for block, span in pairs]

    def _begin(self, num_blocks: int, begun: dict[int, int]) -> int:
        self._numbers += 1
        self._running[self._numbers] = _RunningCopy(num_blocks, begun)
        return self._numbers

    def _digests(self, running: _RunningCopy) -> list[bytes]:
        """Of each block. Where ranks hold other bytes of one unit, it is a digest of no block: a load has failed."""
        held = {
            rank: np.frombuffer(sums, dtype=f"V{WORD_BYTES}").reshape(running.num_blocks, -1)
            for rank, sums in running.sums.items()
        }
        digests = []
        for block in range(running.num_blocks):
            of_units: list[bytes] = []
            for unit in range(self._cut.total_units):
                ranks = [rank for rank in self._cut.holders(unit) if rank in held]
                found = [held[rank][block, unit - self._cut.units(rank).start].tobytes() for rank in ranks]
                of_units += dict.fromkeys(found)  # one, if all are equal
            digests.append(digest_of_sums(of_units))
        return digests
