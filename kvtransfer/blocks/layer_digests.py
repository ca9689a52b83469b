"""Digests over the layers of units, whichever pools hold them: the same for any numbers of stages and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from baton.kvtransfer.blocks.checksum import WORD_BYTES, digest_of_sums
from baton.kvtransfer.reshard import Cut


class LayerPool(Protocol):
    """A rank's, of one stage."""

    def begin_layer_sums(self, blocks: Sequence[int]) -> Callable[[], bytes]:
        """What waits for the checksums of the layers that it has of these blocks, WORD_BYTES each: block by block, unit
        by unit. It is called before the next ones are begun."""
        ...


def layer_digests(cut: Cut, pools: Sequence[LayerPool], chunks: Sequence[Sequence[int]]) -> list[bytes]:
    """Of each of these chunks: over the checksums of the model's layers, block by block, unit by unit.

    pools: of the ranks of `cut` in order, stage by stage. What was written to these blocks must be complete. Of a unit
    that several ranks hold the first one's layers count.
    """
    blocks = [block for chunk in chunks for block in chunk]
    holders = [cut.holders(unit).start for unit in range(cut.total_units)]
    begun = [
        {rank: pools[stage * cut.ranks + rank].begin_layer_sums(blocks) for rank in dict.fromkeys(holders)}
        for stage in range(len(cut.layers))
    ]
    held = []  # of each stage, [blocks, units of the model, layers]
    for layers, ranks in zip(cut.layers, begun, strict=True):
        read = {
            rank: np.frombuffer(wait(), np.uint64).reshape(len(blocks), -1, len(layers)) for rank, wait in ranks.items()
        }
        units = [read[rank][:, unit - cut.units(rank).start] for unit, rank in enumerate(holders)]
        held.append(np.stack(units, axis=1))
    sums = np.concatenate(held, axis=2).tobytes()
    size = cut.total_units * cut.num_layers * WORD_BYTES
    ends = accumulate(len(chunk) * size for chunk in chunks)
    return [digest_of_sums([sums[end - len(chunk) * size : end]]) for chunk, end in zip(chunks, ends, strict=True)]
