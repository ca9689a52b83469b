"""Numbers that the host sends with a step: packed into pinned memory, one copy, and there they lie in a fixed place.

Each array begins at a multiple of 16 bytes: kernels are compiled for aligned arrays, and again for others. The pinned
buffers take turns, and none is written again before its copy has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baton.models.cuda.queue import Mark, Queue
from baton.node.errors import InvariantBroken

BUFFERS = 3
ALIGNED = 4
"""Numbers; 16 bytes."""


def aligned(count: int, to: int = ALIGNED) -> int:
    """`count` rounded up."""
    return -(-count // to) * to


class Upload:
    """Up to `capacity` int32 numbers a time."""

    def __init__(self, queue: Queue, capacity: int) -> None:
        self._queue = queue
        self._capacity = capacity
        self._buffers = [queue.host_buffer(capacity) for _ in range(BUFFERS)]
        self._views = [buffer.numpy() for buffer in self._buffers]
        self._sent: list[Mark | None] = [None] * BUFFERS
        self._turn = 0
        self.there = torch.zeros(capacity, dtype=torch.int32, device=queue.device)

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Enqueue the copy; the arrays on the device, flat, in their order, until the next `send` has run."""
        self._turn = (self._turn + 1) % BUFFERS
        if (mark := self._sent[self._turn]) is not None:
            mark.wait()  # long past: as many launches ago as there are buffers
        view, views, end = self._views[self._turn], [], 0
        for array in arrays:
            begin = aligned(end)
            end = begin + array.size
            if end > self._capacity:
                raise InvariantBroken(f"{end} numbers in an upload of {self._capacity}")
            view[begin:end] = array.ravel()
            views.append(self.there[begin:end])
        source, target = self._buffers[self._turn][:end], self.there[:end]
        self._queue.enqueue(lambda: _copy(target, source))
        self._sent[self._turn] = self._queue.mark()
        return views


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
