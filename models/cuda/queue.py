"""The line in which work for a GPU stands: what is put in runs later, in order, and a mark tells when it has run.

`CudaQueue` is a CUDA stream. `HostQueue` runs the same work on CPU tensors, as late as its user can stand: when a mark
is waited for. What the host changes too early under a launched step comes out wrong there, as it would on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from baton.models.cuda.compiling import compile_ahead

Work = Callable[[], None]


class Mark(Protocol):
    """A place in the line."""

    def wait(self) -> None:
        """Until all work before it has run. Unbounded: who watches the worker sees that it takes no more steps."""
        ...

    def since(self, earlier: Mark) -> float:
        """Seconds of the device between two marks that have passed; 0 where no clock tells."""
        ...


class Queue(Protocol):
    """See the module's docstring."""

    device: str
    num_sms: int
    pdl: bool
    """Whether kernels may overlap the end of the one before (programmatic dependent launch)."""

    def host_buffer(self, size: int) -> torch.Tensor:
        """int32 [size] of host memory that copies to and from the device without waiting."""
        ...

    def enqueue(self, work: Work) -> None: ...

    def mark(self) -> Mark: ...

    def rehearse(self, work: Work) -> None:
        """Have ready what the kernels of `work` need. For that it may run, captures included, but without kernels."""
        ...

    def capture(self, work: Work) -> Work:
        """Work that repeats the launches of `work`, as one. It has run once when this returns."""
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

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return _EventMark(event)

    def rehearse(self, work: Work) -> None:
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
        with torch.cuda.stream(self._stream):
            work()  # compiles what is not compiled yet, which a capture cannot
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


class _EventMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _EventMark), "marks of two kinds of queue"
        return earlier.event.elapsed_time(self.event) / 1e3


class HostQueue:
    """See the module's docstring."""

    device = "cpu"
    num_sms = 4
    pdl = False

    def __init__(self) -> None:
        self._line: deque[Work] = deque()
        self._entered = 0
        self._run = 0

    def host_buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def enqueue(self, work: Work) -> None:
        self._line.append(work)
        self._entered += 1

    def mark(self) -> Mark:
        return _HostMark(self, self._entered)

    def rehearse(self, work: Work) -> None:
        """Interpreted kernels need nothing."""

    def capture(self, work: Work) -> Work:
        self.run_to(self._entered)
        work()
        return work

    def run_to(self, count: int) -> None:
        """Run the first `count` pieces of work that ever entered."""
        while self._run < count:
            self._run += 1
            self._line.popleft()()


class _HostMark:
    def __init__(self, queue: HostQueue, place: int) -> None:
        self._queue, self._place = queue, place

    def wait(self) -> None:
        self._queue.run_to(self._place)

    def since(self, earlier: Mark) -> float:
        return 0.0
