"""Copies between blocks of a GPU's pool and host memory: large pieces where blocks lie together, on an own stream.

Knows pointers and streams; not who owns a block or a byte. Needs a GPU. No worker uses it yet: the host's store has
digests that are made on the host, so a worker with a GPU has no store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kvtransfer.blocks import cudart
from kvtransfer.blocks.device_pool import DeviceMemory
from kvtransfer.planes.runs import common_runs
from node.errors import InvariantBroken


class DeviceCopies:
    """See the module's docstring. One thread makes all calls.

    A copy is a number to ask `ended` with. Until then neither end may be touched, and afterwards the number is no
    copy's. What was written to the blocks must be complete on the GPU before, as for BlockDigests.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        cudart.use_device(memory.device_index)
        self._stream = cudart.create_stream()
        self._events: list[int] = []  # free ones
        self._locked: dict[int, memoryview] = {}  # by address

    def lock(self, view: memoryview) -> None:
        """Host memory of whole pages that copies will use, until `close`; other memory works too, several times slower
        and while the caller waits."""
        pointer = _address(view)
        cudart.lock_pages(pointer, view.nbytes)
        self._locked[pointer] = view

    def to_host(self, blocks: Sequence[int], target: memoryview) -> int:
        """Begin target[i] = block blocks[i]; `target` is contiguous, of len(blocks) blocks."""
        size, host, device = self._memory.block_bytes, self._host(blocks, target), self._memory.pointer
        return self._begin(
            (host + run.target * size, device + run.source * size, run.length * size)
            for run in common_runs(blocks, range(len(blocks)))
        )

    def to_device(self, source: memoryview, blocks: Sequence[int]) -> int:
        """Begin block blocks[i] = source[i]; the blocks differ."""
        size, host, device = self._memory.block_bytes, self._host(blocks, source), self._memory.pointer
        return self._begin(
            (device + run.target * size, host + run.source * size, run.length * size)
            for run in common_runs(range(len(blocks)), blocks)
        )

    def ended(self, copy: int) -> bool:
        """Raises CudaError if it failed."""
        if not cudart.happened(copy):
            return False
        self._events.append(copy)
        return True

    def close(self) -> None:
        """Wait for what runs, and let go of the memory. May be repeated."""
        if not self._stream:
            return
        cudart.use_device(self._memory.device_index)
        torch.cuda.ExternalStream(self._stream, self._memory.device_index).synchronize()
        for pointer in self._locked:
            cudart.unlock_pages(pointer)
        for event in self._events:
            cudart.destroy_event(event)
        self._locked.clear()
        self._events.clear()
        cudart.destroy_stream(self._stream)
        self._stream = 0

    def _host(self, blocks: Sequence[int], view: memoryview) -> int:
        """The address of the host's end."""
        if any(not 0 <= block < self._memory.num_blocks for block in blocks):
            raise InvariantBroken(f"blocks {list(blocks)} of a pool of {self._memory.num_blocks}")
        if view.nbytes != len(blocks) * self._memory.block_bytes:
            raise InvariantBroken(f"{view.nbytes} bytes for {len(blocks)} blocks of {self._memory.block_bytes}")
        return _address(view)

    def _begin(self, pieces: Iterable[tuple[int, int, int]]) -> int:
        """Pieces: to, from, bytes."""
        cudart.use_device(self._memory.device_index)
        for target, source, size_bytes in pieces:
            cudart.copy_async(target, source, size_bytes, self._stream)
        event = self._events.pop() if self._events else cudart.create_event()
        cudart.record(event, self._stream)
        return event


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
