"""What the GPU keeps for each slot from step to step, and the host's books of it: the last drawn token, block table.

A row that comes with its token begins anew: all of its table is sent. A row without token continues what its slot has:
only blocks that are new are sent. Which sequence has which slot is the worker's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baton.models.batch import Row


class Slots:
    """`num_slots` slots, and one more, `padding`, for rows that are no rows; tables of up to `width` blocks."""

    def __init__(self, num_slots: int, width: int, device: str) -> None:
        self.padding = num_slots
        self.last = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(num_slots + 1, width, dtype=torch.int32, device=device)
        self._width = width
        self._held = [0] * num_slots  # blocks that the device knows of each slot

    def begin(self, slot: int) -> None:
        """What the device has of this slot is not the new row's."""
        self._held[slot] = 0

    def changes(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Places in the flat tables, and the blocks to put there, int32 each; the books now say that they are there."""
        places: list[int] = []
        blocks: list[int] = []
        for row in rows:
            if row.token_ids:
                self._held[row.slot] = 0
            held, known = self._held[row.slot], len(row.blocks)
            if held < known:
                places.extend(range(row.slot * self._width + held, row.slot * self._width + known))
                blocks.extend(row.blocks[held:known])
                self._held[row.slot] = known
        return np.array(places, dtype=np.int32), np.array(blocks, dtype=np.int32)
