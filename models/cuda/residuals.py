"""Residuals of steps on their way from one stage of a pipeline to the next, through pinned memory of the host.

They enter and leave on the stream of the steps, so that nothing waits for the GPU but what sends them on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Queue, Upload, copy_async
from baton.models.partition import Stage
from baton.node.errors import InvariantBroken

Enter = Callable[[int], None]
"""Launched first in a step of so many tokens, padding included."""
Left = Callable[[], torch.Tensor]
"""Waits for what a stage has made of a step, [N, hidden] in host memory; valid while the step is in flight."""
WORD_BYTES = 4


def enter_nothing(num_tokens: int) -> None:
    """Of a stage that begins with an embedding."""


class EnteringResiduals:
    """Into `residual`, [rows, hidden], of a stage behind the first; the first has an embedding."""

    def __init__(self, queue: Queue, limits: StepLimits, residual: torch.Tensor, stage: Stage) -> None:
        self._residual = residual
        self._upload = None if stage.is_first else Upload(queue, limits.step_tokens * _words(residual))

    def of_zeros(self, num_tokens: int) -> torch.Tensor:
        """[num_tokens, hidden] to send, of no step."""
        return torch.zeros(num_tokens, self._residual.shape[1], dtype=self._residual.dtype)

    def send(self, entering: torch.Tensor | None, num_tokens: int) -> Enter:
        """Enqueue the copy of [num_tokens, hidden] to the device, where it lies until the next one does."""
        if self._upload is None:
            return enter_nothing
        residual = self._residual
        if entering is None or tuple(entering.shape) != (num_tokens, residual.shape[1]):
            shape = None if entering is None else list(entering.shape)
            raise InvariantBroken(f"{num_tokens} tokens enter a stage with {shape}")
        (sent,) = self._upload.send((entering.view(torch.int32).numpy(),))
        rows = sent.view(residual.dtype).view(num_tokens, -1)

        def enter(padded_tokens: int) -> None:
            residual[:num_tokens].copy_(rows)
            residual[num_tokens:padded_tokens].zero_()  # else layers would add to it from step to step

        return enter


class LeavingResiduals:
    """Out of `residual`, of a stage before the last. Buffers take turns: one is written again when steps are launched
    before which that step was read."""

    def __init__(self, queue: Queue, limits: StepLimits, residual: torch.Tensor) -> None:
        self._queue, self._residual = queue, residual
        rows, words = limits.step_tokens, _words(residual)
        self._buffers = [
            queue.host_buffer(rows * words).view(residual.dtype).view(rows, -1) for _ in range(limits.run_ahead + 2)
        ]
        self._turn = 0

    def take(self, num_tokens: int) -> Left:
        """Enqueue the copy of the step before it."""
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer, residual = self._buffers[self._turn][:num_tokens], self._residual[:num_tokens]
        self._queue.enqueue(lambda: copy_async(buffer, residual))
        mark = self._queue.mark()

        def left() -> torch.Tensor:
            mark.wait()
            return buffer

        return left


def _words(residual: torch.Tensor) -> int:
    """Of a row."""
    return residual.shape[1] * residual.itemsize // WORD_BYTES
