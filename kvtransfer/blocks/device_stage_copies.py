"""Copies between a rank's pools of all stages and the arena of the host's store, as if they were one pool.

A record has whole units, with the layers of all stages and the padding of the model's layout, which is zero. Each stage
copies its layers and sums up their terms; the checksum of a unit is made of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from baton.kvtransfer.blocks.checksum import checksums_of_parts, part_sums
from baton.kvtransfer.blocks.copies import Lock, Pair
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.rank_copies import UnitCopies


@dataclass(slots=True)
class _RunningCopy:
    left: dict[int, int]
    """Stages, and their numbers of the copy."""
    sums: dict[int, bytes] = field(default_factory=dict)


class DeviceStageCopies:
    """`stages`: in order, each over its layers, whose unit_sums are sums of terms. Meets UnitCopies."""

    def __init__(self, stages: Sequence[UnitCopies], layout: KVLayout) -> None:
        """`layout`: of the rank's units, with all layers."""
        self.block_bytes = layout.block_bytes
        self.batch_blocks = min(stage.batch_blocks for stage in stages)
        self._stages, self._num_units, self._unit_bytes = stages, layout.num_units, layout.unit_bytes
        self._padding_bytes = layout.padding_bytes
        padding = np.zeros((1, layout.padding_bytes), np.uint8)
        self._padding_sum = part_sums(padding, layout.unit_bytes - layout.padding_bytes)  # [1]
        self._numbers = 0
        self._running: dict[int, _RunningCopy] = {}

    def lock(self, memory: memoryview) -> Lock:
        """By one stage, for the GPUs of all."""
        return self._stages[0].lock(memory)

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        return self._begin([stage.begin_load(pairs) for stage in self._stages])

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        if self._padding_bytes:
            for _, span in pairs:
                units = np.frombuffer(span, np.uint8).reshape(self._num_units, self._unit_bytes)
                units[:, -self._padding_bytes :] = 0
        return self._begin([stage.begin_save(pairs) for stage in self._stages])

    def unit_sums(self, copy: int) -> bytes | None:
        running = self._running[copy]
        for stage, number in list(running.left.items()):
            sums = self._stages[stage].unit_sums(number)
            if sums is not None:
                running.sums[stage] = sums
                del running.left[stage]
        if running.left:
            return None
        del self._running[copy]
        parts = [np.frombuffer(sums, np.uint64) for sums in running.sums.values()]
        padding = np.repeat(self._padding_sum, len(parts[0]))
        return checksums_of_parts([*parts, padding], self._unit_bytes).tobytes()

    def close(self) -> None:
        for stage in self._stages:
            stage.close()
        self._running.clear()

    def _begin(self, begun: Sequence[int]) -> int:
        self._numbers += 1
        self._running[self._numbers] = _RunningCopy(dict(enumerate(begun)))
        return self._numbers
