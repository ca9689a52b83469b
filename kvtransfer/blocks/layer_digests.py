"""Digests over the layers of units, whichever pools hold them: the same for any numbers of stages and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

from baton.kvtransfer.blocks.checksum import WORD_BYTES, digest_of_sums
from baton.kvtransfer.reshard import Cut


class LayerPool(Protocol):
    """A rank's, of one stage."""

    def layer_sums(self, blocks: Sequence[int]) -> bytes:
        """Checksums of the layers that it has of these blocks, WORD_BYTES each: block by block, unit by unit."""
        ...


def layer_digests(cut: Cut, pools: Sequence[LayerPool], chunks: Sequence[Sequence[int]]) -> list[bytes]:
    """Of each of these chunks: over the checksums of the model's layers, block by block, unit by unit.

    pools: of the ranks of `cut` in order, stage by stage. What was written to these blocks must be complete. Of a unit
    that several ranks hold the first one's layers count.
    """
    blocks = [block for chunk in chunks for block in chunk]
    held = [
        _stage_sums(cut, len(layers), pools[stage * cut.ranks :][: cut.ranks], blocks)
        for stage, layers in enumerate(cut.layers)
    ]
    sums = np.concatenate(held, axis=2).tobytes()
    size = cut.total_units * cut.num_layers * WORD_BYTES
    ends = accumulate(len(chunk) * size for chunk in chunks)
    return [digest_of_sums([sums[end - len(chunk) * size : end]]) for chunk, end in zip(chunks, ends, strict=True)]


def _stage_sums(cut: Cut, num_layers: int, pools: Sequence[LayerPool], blocks: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Of a stage with these layers: [blocks, units of the model, layers]."""
    holders = [cut.holders(unit).start for unit in range(cut.total_units)]
    held = {
        rank: np.frombuffer(pools[rank].layer_sums(blocks), np.uint64).reshape(len(blocks), -1, num_layers)
        for rank in dict.fromkeys(holders)
    }
    return np.stack([held[rank][:, unit - cut.units(rank).start] for unit, rank in enumerate(holders)], axis=1)
