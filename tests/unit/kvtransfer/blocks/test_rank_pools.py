"""Digests of blocks that lie in several pools: the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import xxhash

from baton.kvtransfer.blocks.rank_pools import RankPools
from baton.kvtransfer.reshard import Cut

UNITS, BLOCKS = 4, 6
SUMS = torch.randint(0, 1 << 62, (BLOCKS, UNITS), generator=torch.Generator().manual_seed(1))


class RankSums:
    """A rank's pool, of which only the checksums are known."""

    num_blocks = BLOCKS

    def __init__(self, units: range) -> None:
        self._sums = SUMS[:, units.start : units.stop]
        self.closed = 0

    def unit_sums(self, blocks: Sequence[int]) -> bytes:
        return self._sums[list(blocks)].contiguous().numpy().tobytes()

    def begin_layer_sums(self, blocks: Sequence[int]) -> Callable[[], bytes]:
        sums = self._sums[list(blocks)]
        return torch.stack([sums, sums + 1], dim=2).numpy().tobytes

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_ranks_has_the_digest_of_one(count):
    """Guards against units in the order of ranks and not of the model, heads that several ranks hold, and chunks that
    are taken together."""
    cut = Cut.even(UNITS, count, 2)
    ranks = [RankSums(cut.units(rank)) for rank in range(count)]
    pools, chunks = RankPools(ranks, cut), [[3, 1], [5], [0, 2, 4]]
    assert pools.digests(chunks) == [xxhash.xxh3_128_digest(SUMS[blocks].numpy().tobytes()) for blocks in chunks]
    layers = torch.stack([SUMS, SUMS + 1], dim=2)
    assert pools.layers_digest([4, 1]) == xxhash.xxh3_128_digest(layers[[4, 1]].numpy().tobytes())
    pools.close()
    assert [rank.closed for rank in ranks] == [1] * count
