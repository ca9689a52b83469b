"""Residuals of steps on their way from one stage of a pipeline to the next, through pinned memory of the host.

They enter and leave on the stream of the steps, so that nothing waits for the GPU but what sends them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Queue, QueueMark, copy_async
from baton.models.partition import Stage
from baton.node.errors import InvariantBroken

Enter = Callable[[int], None]
"""Launched first in a step of so many tokens, padding included."""


def enter_nothing(num_tokens: int) -> None:
    """Of a stage that begins with an embedding."""


@dataclass(frozen=True, slots=True)
class ResidualSlots:
    """Host memory for what steps in flight leave a stage with. Slots take turns, a step each: one is written again when
    steps are launched before which its own was read."""

    count: int
    rows: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, limits: StepLimits, hidden_size: int, dtype: torch.dtype) -> ResidualSlots:
        return cls(limits.run_ahead + 2, limits.step_tokens, hidden_size, dtype)

    @property
    def size_bytes(self) -> int:
        return self.count * self.rows * self.width * self.dtype.itemsize

    def over(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[rows, width] each, in uint8 [size_bytes] or more."""
        return memory[: self.size_bytes].view(self.dtype).view(self.count, self.rows, self.width).unbind()


class EnteringResiduals:
    """Into `residual`, [rows, hidden], of a stage behind the first; the first has an embedding."""

    def __init__(self, residual: torch.Tensor, stage: Stage) -> None:
        self._residual, self._stage = residual, stage

    def of_zeros(self, num_tokens: int) -> torch.Tensor:
        """[num_tokens, hidden], of no step."""
        return torch.zeros(num_tokens, self._residual.shape[1], dtype=self._residual.dtype)

    def of(self, entering: torch.Tensor | None, num_tokens: int) -> Enter:
        """entering: [num_tokens, hidden] in pinned memory, which does not change before the step has run."""
        if self._stage.is_first:
            return enter_nothing
        if entering is None or tuple(entering.shape) != (num_tokens, self._residual.shape[1]):
            shape = None if entering is None else list(entering.shape)
            raise InvariantBroken(f"{num_tokens} tokens enter a stage with {shape}")
        return partial(self._enter, entering)

    def _enter(self, entering: torch.Tensor, padded_tokens: int) -> None:
        copy_async(self._residual[: len(entering)], entering)
        self._residual[len(entering) : padded_tokens].zero_()  # else layers would add to it from step to step


@dataclass(frozen=True, slots=True)
class LeftResidual:
    """What a stage has made of a step, in host memory."""

    slot: int
    """Its number."""
    rows: torch.Tensor  # [N, hidden]
    mark: QueueMark

    def wait(self) -> torch.Tensor:
        """The rows, once they are there; valid while the step is in flight."""
        self.mark.wait()
        return self.rows


class LeavingResiduals:
    """Out of `residual`, of a stage before the last, to slots of pinned memory in turn."""

    def __init__(self, queue: Queue, residual: torch.Tensor, slots: Sequence[torch.Tensor]) -> None:
        self._queue, self._residual, self._slots = queue, residual, slots
        self._turn = 0

    def take(self, num_tokens: int) -> LeftResidual:
        """Enqueue the copy of the step before it."""
        self._turn = (self._turn + 1) % len(self._slots)
        rows, residual = self._slots[self._turn][:num_tokens], self._residual[:num_tokens]
        self._queue.enqueue(lambda: copy_async(rows, residual))
        return LeftResidual(self._turn, rows, self._queue.mark())


def pinned_slots(queue: Queue, shape: ResidualSlots) -> tuple[torch.Tensor, ...]:
    """In memory of this process alone."""
    return shape.over(queue.host_buffer(-(-shape.size_bytes // 4)).view(torch.uint8))
