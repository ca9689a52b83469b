"""A GPU's stream of work, and what the host sends along with it.

What is put into a `Queue` runs later, in order, and a mark says when it has run. `CudaQueue` is a CUDA stream;
`testing.late_queue` runs the same work on CPU tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from baton.models.cuda.compiling import compile_ahead
from baton.node.errors import InvariantBroken

Work = Callable[[], None]
T = TypeVar("T")
Hole = Callable[..., None]
"""Launches that are not captured, in the midst of some that are."""

BUFFERS = 3
ALIGNED = 4
"""Numbers; 16 bytes."""


class QueueMark(Protocol):
    """A place in the stream."""

    def wait(self) -> None:
        """Until all work before it has run. Unbounded: a worker whose steps stand still shows in its heartbeats."""
        ...

    def since(self, earlier: QueueMark) -> float:
        """Seconds of the device between two marks that have passed; 0 where the device has no clock."""
        ...

    @property
    def passed(self) -> bool:
        """Whether all work before it has run; never waits."""
        ...


class Queue(Protocol):
    """An ordered stream of device work."""

    device: str
    num_sms: int
    pdl: bool
    """Whether kernels may overlap the end of the one before (programmatic dependent launch)."""

    def host_buffer(self, size: int) -> torch.Tensor:
        """int32 [size] of host memory that copies to and from the device without waiting."""
        ...

    def enqueue(self, work: Work) -> None: ...

    def mark(self) -> QueueMark: ...

    def beside(self) -> Queue:
        """A stream of the same device of its own, whose work runs beside this one's."""
        ...

    def rehearse(self, work: Work) -> None:
        """Have ready what the kernels of `work` need. For that it may run, captures included, but without kernels."""
        ...

    def capture(self, work: Work) -> Work:
        """Work that repeats the launches of `work`, as one. It has run once when this returns."""
        ...

    def capture_around(self, work: Callable[[Hole], T]) -> Callable[[Hole], T]:
        """Repeats the launches of `work`, but where that calls its hole calls the one given, with the same arguments;
        what `work` returned. The launches between two calls are one."""
        ...


class CudaQueue:
    """A stream of its own on one GPU."""

    def __init__(self, index: int) -> None:
        self.device = f"cuda:{index}"
        self.num_sms = torch.cuda.get_device_properties(index).multi_processor_count
        self.pdl = torch.cuda.get_device_capability(index) >= (9, 0)
        self._stream = torch.cuda.Stream(index)
        self._pool = torch.cuda.graph_pool_handle()
        self._rehearsing = False

    def host_buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=True)

    def enqueue(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> QueueMark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return _EventMark(event)

    def beside(self) -> CudaQueue:
        return CudaQueue(self._stream.device.index)

    def rehearse(self, work: Work) -> None:
        torch.cuda.current_stream(self._stream.device).synchronize()  # there memory that steps read was cleared
        self._rehearsing = True
        try:
            compile_ahead(work)
        finally:
            self._rehearsing = False

    def capture(self, work: Work) -> Work:
        if self._rehearsing:
            self.enqueue(work)
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), without_collections():
            work()  # compiles what is not compiled yet, which a capture cannot
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def capture_around(self, work: Callable[[Hole], T]) -> Callable[[Hole], T]:
        if self._rehearsing:
            self.enqueue(lambda: leave_out(work(leave_out)))
            return work
        graphs: list[torch.cuda.CUDAGraph] = []
        calls: list[tuple[Any, ...]] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(pool=self._pool)

        def cut(*call: Any) -> None:
            graphs[-1].capture_end()
            calls.append(call)
            begin()

        with torch.cuda.stream(self._stream), without_collections():
            work(leave_out)  # as in `capture`
            self._stream.synchronize()
            begin()
            try:
                made = work(cut)
            finally:
                graphs[-1].capture_end()

        def replay(hole: Hole) -> T:
            for graph, call in zip(graphs, calls, strict=False):
                graph.replay()
                hole(*call)
            graphs[-1].replay()
            return made

        return replay


@contextmanager
def without_collections() -> Iterator[None]:
    """No unused cycle of objects is destroyed inside: a capture ends in an error when CUDA is asked about an event, as
    it is when pinned memory is freed."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def leave_out(*call: Any) -> None:
    """A hole in which nothing is launched."""


class _EventMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def since(self, earlier: QueueMark) -> float:
        assert isinstance(earlier, _EventMark), "marks of two kinds of queue"
        return earlier.event.elapsed_time(self.event) / 1e3

    @property
    def passed(self) -> bool:
        return self.event.query()


def aligned(count: int, to: int = ALIGNED) -> int:
    """`count` rounded up."""
    return -(-count // to) * to


class Upload:
    """Numbers that the host sends with a step, up to `capacity` int32 a time: packed into pinned memory, one copy, and
    there they lie in a fixed place.

    Each array begins at a multiple of 16 bytes: kernels are compiled for aligned arrays, and again for others. The
    pinned buffers take turns, and none is written again before its copy has run.
    """

    def __init__(self, queue: Queue, capacity: int) -> None:
        self._queue = queue
        self._capacity = capacity
        self._buffers = [queue.host_buffer(capacity) for _ in range(BUFFERS)]
        self._views = [buffer.numpy() for buffer in self._buffers]
        self._sent: list[QueueMark | None] = [None] * BUFFERS
        self._turn = 0
        self.there = torch.empty(capacity, dtype=torch.int32, device=queue.device)
        queue.enqueue(self._clear)  # elsewhere it might run behind the first copy

    def _clear(self) -> None:
        self.there.zero_()

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
        self._queue.enqueue(lambda: copy_async(target, source))
        self._sent[self._turn] = self._queue.mark()
        return views


def copy_async(target: torch.Tensor, source: torch.Tensor) -> None:
    """To or from pinned memory, without waiting."""
    target.copy_(source, non_blocking=True)


class Draws:
    """The draws of one step: enqueued behind what they draw from or, where masks come later, all at its end."""

    def __init__(self, queue: Queue, *, deferred: bool) -> None:
        self.deferred = deferred
        self._queue = queue
        self._waiting: list[Work] = []

    def launch(self, forward: Work, choose: Work) -> None:
        def both() -> None:
            forward()
            choose()

        self._queue.enqueue(forward if self.deferred else both)
        if self.deferred:
            self._waiting.append(choose)

    def enqueue(self) -> None:
        for choose in self._waiting:
            self._queue.enqueue(choose)
