"""The pools of all ranks of a worker, each on a GPU of its own, as one: block ids are the same in all of them.

A rank has the units of its KV heads. The digest of a block is over the units of the model in their order, whichever
rank holds them, so that workers with any numbers of ranks agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

from baton.kvtransfer.blocks.checksum import WORD_BYTES
from baton.kvtransfer.blocks.layer_digests import LayerPool, layer_digests
from baton.kvtransfer.reshard import Cut


class UnitPool(LayerPool, Protocol):
    """A rank's."""

    num_blocks: int

    def unit_sums(self, blocks: Sequence[int]) -> bytes:
        """Checksums of the units of these blocks, WORD_BYTES each, block by block."""
        ...

    def close(self) -> None: ...


class RankPools:
    """`pools`: of the ranks in order, over the units that `cut` gives them."""

    def __init__(self, pools: Sequence[UnitPool], cut: Cut) -> None:
        self.pools, self._cut = tuple(pools), cut
        self.num_blocks = pools[0].num_blocks
        self._first_holders = [cut.holders(unit).start for unit in range(cut.total_units)]

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """See BlockDigests.digests; what was written to these blocks must be complete on all GPUs."""
        blocks = [block for chunk in chunks for block in chunk]
        held = {
            rank: np.frombuffer(self.pools[rank].unit_sums(blocks), dtype=f"V{WORD_BYTES}").reshape(len(blocks), -1)
            for rank in dict.fromkeys(self._first_holders)
        }
        units = [held[rank][:, unit - self._cut.units(rank).start] for unit, rank in enumerate(self._first_holders)]
        sums = memoryview(np.stack(units, axis=1).tobytes())
        digests, begin = [], 0
        for chunk in chunks:
            end = begin + len(chunk) * self._cut.total_units * WORD_BYTES
            digests.append(xxhash.xxh3_128_digest(sums[begin:end]))
            begin = end
        return digests

    def layers_digest(self, blocks: Sequence[int]) -> bytes:
        """Of the same blocks, for planes by layer."""
        return layer_digests(self._cut, self.pools, [blocks])[0]

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
