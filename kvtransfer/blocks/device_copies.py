"""Copies between blocks of a GPU's pool and the host's arena (copies.py), each direction on a stream.

What lies together or evenly spaced at both ends is one copy; behind a batch's copies a kernel makes the digests of the
blocks in the pool, so that 8 bytes a unit are all that the host looks at. Needs a GPU.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.copies import IN_FLIGHT, Pair
from baton.kvtransfer.blocks.device_pool import DeviceMemory
from baton.kvtransfer.blocks.digest import Checksums, UnitRows
from baton.kvtransfer.blocks.run_copies import copy_runs_async
from baton.kvtransfer.blocks.runs import BlockRun, common_runs
from baton.node.errors import InvariantBroken, PeerLost
from baton.node.messages.store import DigestName
from baton.node.telemetry import log_event

logger = logging.getLogger("store_client")

BATCH_BYTES = 128 << 20
"""2.5 ms at 50 GB/s: ten times as long as the loop may sleep between looks."""
MAX_BATCH_BLOCKS = 64
"""Of small blocks, which may lie apart: as many calls to begin one batch."""


class UnitPart(NamedTuple):
    """What of each unit of a record is in a pool, from the begin of a unit of the pool on."""

    first_byte: int
    part_bytes: int
    unit_bytes: int
    """Of the record."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one batch needs while it runs."""

    checksums: Checksums
    event: int


class _Lane:
    """A stream, and room for IN_FLIGHT batches on it."""

    def __init__(self, memory: DeviceMemory, batch_blocks: int, rows: UnitRows) -> None:
        # Torch's own, never destroyed: pinned memory that was used on a stream is given back by an event on it.
        self._stream = torch.cuda.Stream(memory.device_index)
        self.stream = self._stream.cuda_stream
        self.free = [_Slot(Checksums(memory.data, batch_blocks, rows), cudart.create_event()) for _ in range(IN_FLIGHT)]

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

    def __init__(self, memory: DeviceMemory, part: UnitPart | None = None) -> None:
        """part: where the pool has not all of a unit; `ended` is for those that have."""
        self._pool_unit_bytes = memory.block_bytes // memory.num_units
        self._part = part or UnitPart(0, self._pool_unit_bytes, self._pool_unit_bytes)
        self.block_bytes = memory.num_units * self._part.unit_bytes
        self.num_units = memory.num_units
        self.batch_blocks = min(MAX_BATCH_BLOCKS, max(1, BATCH_BYTES // self.block_bytes))
        self.digest: DigestName = "sum64"
        self._memory = memory
        self._numbers = 0
        self._running: dict[int, _Running] = {}
        cudart.use_device(memory.device_index)
        rows = UnitRows(1, self._part.part_bytes, None if part is None else part.first_byte)
        self._loads, self._saves = (_Lane(memory, self.batch_blocks, rows) for _ in range(2))
        for lane in (self._loads, self._saves):  # loads the kernels, which later would wait for the whole device
            lane.digest(lane.free[0], [0])
            lane.wait()

    def lock(self, memory: memoryview) -> PageLock:
        """Copies of other memory would block, at a fraction of the speed: without the lock there are none."""
        return PageLock(memory, self._memory.device_index)

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        return self._begin(self._loads, pairs, self._runs(self._in_records(pairs), self._in_pool(pairs)))

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        return self._begin(self._saves, pairs, self._runs(self._in_pool(pairs), self._in_records(pairs)))

    def ended(self, copy: int) -> list[bytes] | None:
        """Raises CudaError if it failed: the GPU does nothing more for this process then."""
        checksums = self._ended(copy)
        return None if checksums is None else checksums.digests()

    def unit_sums(self, copy: int) -> bytes | None:
        """As `ended`, but checksums of units, or sums of the terms of parts, WORD_BYTES each, block by block."""
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

    def _in_pool(self, pairs: Sequence[Pair]) -> list[int]:
        """Addresses of all units of these blocks, or of their parts."""
        units = range(self.num_units)
        firsts = [self._memory.pointer + block * self._memory.block_bytes for block, _ in pairs]
        return [first + unit * self._pool_unit_bytes for first in firsts for unit in units]

    def _in_records(self, pairs: Sequence[Pair]) -> list[int]:
        units = range(self.num_units)
        firsts = [_address(span) + self._part.first_byte for _, span in pairs]
        return [first + unit * self._part.unit_bytes for first in firsts for unit in units]

    def _runs(self, source: Sequence[int], target: Sequence[int]) -> list[BlockRun]:
        """Of bytes."""
        size = self._part.part_bytes
        return [BlockRun(run.source, run.target, run.length * size) for run in common_runs(source, target, size)]

    def _begin(self, lane: _Lane, pairs: Sequence[Pair], runs: Sequence[BlockRun]) -> int:
        if not lane.free or any(span.nbytes != self.block_bytes for _, span in pairs):
            raise InvariantBroken(f"{len(pairs)} blocks to copy, room for {len(lane.free)} batches more")
        blocks = [block for block, _ in pairs]
        if any(not 0 <= block < self._memory.num_blocks for block in blocks):
            raise InvariantBroken(f"blocks {blocks} of a pool of {self._memory.num_blocks}")
        cudart.use_device(self._memory.device_index)
        slot = lane.free.pop()
        copy_runs_async(0, 0, runs, lane.stream)
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
