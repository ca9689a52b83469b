"""Copies between blocks of a GPU's pool and the host's arena (copies.py), each direction on a stream.

Blocks that lie together at both ends are one copy; behind a batch's copies a kernel makes the digests of the blocks in
the pool, so that 8 bytes a unit are all that the host looks at. Needs a GPU.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.copies import IN_FLIGHT, Pair
from baton.kvtransfer.blocks.device_pool import DeviceMemory
from baton.kvtransfer.blocks.digest import Checksums
from baton.kvtransfer.blocks.runs import common_runs
from baton.node.errors import InvariantBroken, PeerLost
from baton.node.messages.store import DigestName
from baton.node.telemetry import log_event

logger = logging.getLogger("store_client")

BATCH_BYTES = 128 << 20
"""2.5 ms at 50 GB/s: ten times as long as the loop may sleep between looks."""
MAX_BATCH_BLOCKS = 64
"""Of small blocks, which may lie apart: as many calls to begin one batch."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one batch needs while it runs."""

    checksums: Checksums
    event: int


class _Lane:
    """A stream, and room for IN_FLIGHT batches on it."""

    def __init__(self, memory: DeviceMemory, batch_blocks: int) -> None:
        # Torch's own, never destroyed: pinned memory that was used on a stream is given back by an event on it.
        self._stream = torch.cuda.Stream(memory.device_index)
        self.stream = self._stream.cuda_stream
        self.free = [_Slot(Checksums(memory.data, batch_blocks), cudart.create_event()) for _ in range(IN_FLIGHT)]

    def digest(self, slot: _Slot, blocks: Sequence[int]) -> None:
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            slot.checksums.launch(blocks)
        cudart.record(slot.event, self.stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        for slot in self.free:
            cudart.destroy_event(slot.event)
        self.free.clear()


@dataclass(frozen=True, slots=True)
class _Running:
    lane: _Lane
    slot: _Slot
    pairs: Sequence[Pair]
    """Its spans keep the arena mapped."""


class DeviceCopies:
    """Copies between a GPU's pool and host memory.

    What was written to a block must be complete on the GPU before it is saved.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.block_bytes = memory.block_bytes
        self.num_units = memory.num_units
        self.batch_blocks = min(MAX_BATCH_BLOCKS, max(1, BATCH_BYTES // memory.block_bytes))
        self.digest: DigestName = "sum64"
        self._memory = memory
        self._numbers = 0
        self._running: dict[int, _Running] = {}
        cudart.use_device(memory.device_index)
        self._loads, self._saves = (_Lane(memory, self.batch_blocks) for _ in range(2))
        for lane in (self._loads, self._saves):  # loads the kernels, which later would wait for the whole device
            lane.digest(lane.free[0], [0])
            lane.wait()

    def lock(self, memory: memoryview) -> PageLock:
        """Copies of other memory would block, at a fraction of the speed: without the lock there are none."""
        return PageLock(memory, self._memory.device_index)

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        size, pool = self.block_bytes, self._memory.pointer
        runs = common_runs([_address(span) for _, span in pairs], [pool + block * size for block, _ in pairs], size)
        return self._begin(self._loads, pairs, ((run.target, run.source, run.length * size) for run in runs))

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        size, pool = self.block_bytes, self._memory.pointer
        runs = common_runs([pool + block * size for block, _ in pairs], [_address(span) for _, span in pairs], size)
        return self._begin(self._saves, pairs, ((run.target, run.source, run.length * size) for run in runs))

    def ended(self, copy: int) -> list[bytes] | None:
        """Raises CudaError if it failed: the GPU does nothing more for this process then."""
        checksums = self._ended(copy)
        return None if checksums is None else checksums.digests()

    def unit_sums(self, copy: int) -> bytes | None:
        """As `ended`, but checksums of units, WORD_BYTES each, block by block."""
        checksums = self._ended(copy)
        return None if checksums is None else checksums.result()

    def close(self) -> None:
        cudart.use_device(self._memory.device_index)
        for lane in (self._loads, self._saves):
            lane.wait()
        for running in self._running.values():
            running.lane.free.append(running.slot)
        self._running.clear()
        for lane in (self._loads, self._saves):
            lane.close()

    def _ended(self, copy: int) -> Checksums | None:
        """Valid until the next copy begins."""
        running = self._running[copy]
        if not cudart.happened(running.slot.event):
            return None
        del self._running[copy]
        running.lane.free.append(running.slot)
        return running.slot.checksums

    def _begin(self, lane: _Lane, pairs: Sequence[Pair], pieces: Iterable[tuple[int, int, int]]) -> int:
        """Pieces: to, from, bytes."""
        if not lane.free or any(span.nbytes != self.block_bytes for _, span in pairs):
            raise InvariantBroken(f"{len(pairs)} blocks to copy, room for {len(lane.free)} batches more")
        blocks = [block for block, _ in pairs]
        if any(not 0 <= block < self._memory.num_blocks for block in blocks):
            raise InvariantBroken(f"blocks {blocks} of a pool of {self._memory.num_blocks}")
        cudart.use_device(self._memory.device_index)
        slot = lane.free.pop()
        for target, source, size_bytes in pieces:
            cudart.copy_async(target, source, size_bytes, lane.stream)
        lane.digest(slot, blocks)
        self._numbers += 1
        self._running[self._numbers] = _Running(lane, slot, pairs)
        return self._numbers


class PageLock:
    """Locks the pages of host memory, and unlocks them after `close`, in a thread: both take seconds for tens of GiB.

    All of the memory is taken from the host at once. The thread keeps it mapped as long as it is locked. cuda-bindings
    runs other threads meanwhile (from 12.9.1 on).
    """

    def __init__(self, memory: memoryview, device_index: int) -> None:
        """`memory`: whole pages."""
        self._device_index = device_index
        self._error = ""
        self._locked = threading.Event()
        self._unwanted = threading.Event()
        threading.Thread(target=self._run, args=(memory,), name="page-lock", daemon=True).start()

    def ready(self) -> bool:
        if self._error:
            raise PeerLost(f"cannot lock the arena's pages: {self._error}")
        return self._locked.is_set()

    def close(self) -> None:
        self._unwanted.set()

    def _run(self, memory: memoryview) -> None:
        pointer, began_at = _address(memory), time.monotonic()
        try:
            cudart.use_device(self._device_index)
            cudart.lock_pages(pointer, memory.nbytes)
            log_event(logger, "arena_locked", took_s=round(time.monotonic() - began_at, 1))
            self._locked.set()
            self._unwanted.wait()  # as long as the store and this worker live
            cudart.unlock_pages(pointer)
        except cudart.CudaError as error:
            self._error = str(error)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
