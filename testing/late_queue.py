"""A queue of device work on CPU tensors that runs work as late as is legal: when a mark behind it is waited for.

If the host overwrites the inputs of a launched step too early, the result is wrong here, as it would be on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from baton.models.cuda.queue import Hole, QueueMark, T, Work


class LateQueue:
    """A work queue that runs its work only when a mark behind it is waited for."""

    device = "cpu"
    num_sms = 4
    pdl = False

    def __init__(self) -> None:
        self._pending: deque[Work] = deque()
        self._entered = 0
        self._run = 0

    def host_buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def enqueue(self, work: Work) -> None:
        self._pending.append(work)
        self._entered += 1

    def mark(self) -> QueueMark:
        return _LateMark(self, self._entered)

    def beside(self) -> LateQueue:
        return LateQueue()

    def rehearse(self, work: Work) -> None:
        """Does nothing: interpreted kernels need no warm-up."""

    def capture(self, work: Work) -> Work:
        self.run_to(self._entered)
        work()
        return work

    def capture_around(self, work: Callable[[Hole], T]) -> Callable[[Hole], T]:
        return work

    def run_to(self, count: int) -> None:
        """Run queued work until `count` pieces have run since the start."""
        while self._run < count:
            self._run += 1
            self._pending.popleft()()


class _LateMark:
    def __init__(self, queue: LateQueue, place: int) -> None:
        self._queue, self._place = queue, place

    def wait(self) -> None:
        self._queue.run_to(self._place)

    def since(self, earlier: QueueMark) -> float:
        return 0.0

    @property
    def passed(self) -> bool:
        """Asking for it runs the work: there is no thread that would."""
        self.wait()
        return True
