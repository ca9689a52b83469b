"""The copy engine behind the plane `cuda_ipc`: maps another process's pool and copies out of it on a side stream.

Behind each copy a kernel makes the checksums of what has come, on a stream of its own, so that the next copy does not
wait for it and the host waits for neither. Knows pointers, streams and events; no peer and no transfer. Needs a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.checksum import WORD_BYTES
from baton.kvtransfer.blocks.device_pool import NONCE_BYTES, DeviceLayerMemory, PoolMemory
from baton.kvtransfer.blocks.digest import Checksums
from baton.kvtransfer.blocks.run_copies import copy_runs_async
from baton.kvtransfer.blocks.runs import BlockRun, RowSpacing
from baton.kvtransfer.planes.cuda_ipc import Exported
from baton.kvtransfer.planes.self_test import PROBE_BYTES, SelfTest
from baton.node.errors import PeerLost

logger = logging.getLogger("kvtransfer.cuda_ipc")

DIGESTS, DIGEST_BLOCKS = 16, 1024
"""So many copies at once, of up to so many blocks each, get their digests here."""


@dataclass(frozen=True, slots=True)
class _Copy:
    event: int
    checksums: Checksums | None


class CudaPullEngine:
    """Copies into `memory`. One thread makes all calls."""

    def __init__(self, memory: PoolMemory | DeviceLayerMemory, self_test: SelfTest) -> None:
        self._memory = memory
        self._self_test = self_test
        cudart.use_device(memory.device_index)
        self._stream = cudart.create_stream()
        self._pulling = torch.cuda.ExternalStream(self._stream, memory.device_index)  # the same, as torch sees it
        # Torch's own, never destroyed: pinned memory that was used on a stream is given back by an event on it.
        self._digest_stream = torch.cuda.Stream(memory.device_index, priority=-1)  # before what computes
        self._checksums: list[Checksums] = []  # free ones
        if not isinstance(memory, DeviceLayerMemory) and memory.block_bytes // memory.num_units % WORD_BYTES == 0:
            self._checksums = [Checksums(memory.data, DIGEST_BLOCKS) for _ in range(DIGESTS)]
        self._events: list[int] = []  # free ones
        self._copies: dict[int, _Copy] = {}
        self._numbers = 0
        self._opened: set[int] = set()

    @property
    def num_blocks(self) -> int:
        return self._memory.num_blocks

    @property
    def rows(self) -> RowSpacing:
        return self._memory.rows

    def export(self) -> Exported:
        memory = self._memory
        return Exported(memory.handle, memory.payload_bytes, memory.nonce, memory.device_uuid, memory.rows)

    def open(self, exported: Exported) -> int:
        """Map, compare the nonce behind the payload, and measure a pull: a few milliseconds, once a peer."""
        cudart.use_device(self._memory.device_index)
        try:
            pointer = cudart.open_handle(exported.handle)
            self._opened.add(pointer)
            seen = torch.empty(NONCE_BYTES, dtype=torch.uint8)
            cudart.copy(seen.data_ptr(), pointer + exported.size_bytes, NONCE_BYTES)
        except cudart.CudaError as error:
            raise PeerLost(f"cannot map the peer's pool: {error}") from error
        if seen.numpy().tobytes() != exported.nonce:
            self.close(pointer)
            raise PeerLost("the mapped memory is not the one described: its nonce differs")
        self._measure(pointer, exported)
        return pointer

    def close(self, pointer: int) -> None:
        cudart.use_device(self._memory.device_index)
        self._opened.discard(pointer)
        try:
            cudart.close_handle(pointer)
        except cudart.CudaError as error:
            logger.warning("cannot unmap a peer's pool: %s", error)

    def pull(self, pointer: int, runs: Sequence[BlockRun], blocks: Sequence[int]) -> int:
        cudart.use_device(self._memory.device_index)
        try:
            copy_runs_async(self._memory.pointer, pointer, runs, self._stream)
            event = self._events.pop() if self._events else cudart.create_event()
            checksums = self._digest(blocks, event)
            if checksums is None:
                cudart.record(event, self._stream)
        except cudart.CudaError as error:
            with suppress(RuntimeError):  # copies that were begun must not write when the blocks count as free
                self._pulling.synchronize()
            raise PeerLost(f"cannot copy from the peer's pool: {error}") from error
        self._numbers += 1
        self._copies[self._numbers] = _Copy(event, checksums)
        return self._numbers

    def ended(self, copy: int) -> bytes | None:
        event, checksums = self._copies[copy].event, self._copies[copy].checksums
        try:
            if not cudart.happened(event):
                return None
        except cudart.CudaError as error:  # the GPU does nothing more for this process: what the copy used stays lost
            del self._copies[copy]
            raise PeerLost(f"a copy from the peer's pool failed: {error}") from error
        del self._copies[copy]
        self._events.append(event)
        if checksums is None:
            return b""
        self._checksums.append(checksums)
        return checksums.result()

    def shut(self) -> None:
        if not self._stream:
            return
        cudart.use_device(self._memory.device_index)
        self._pulling.synchronize()
        self._digest_stream.synchronize()
        for pointer in list(self._opened):
            self.close(pointer)
        for event in (*self._events, *(copy.event for copy in self._copies.values())):
            cudart.destroy_event(event)
        self._events.clear()
        self._copies.clear()
        cudart.destroy_stream(self._stream)
        self._stream = 0

    def _digest(self, blocks: Sequence[int], event: int) -> Checksums | None:
        """Of these blocks, when the copies that were begun are over; then the event happens. None where there is no
        room, or it cannot be made here: then the receiver makes it."""
        if not self._checksums or len(blocks) > self._checksums[0].max_blocks:
            return None
        checksums = self._checksums.pop()
        try:
            with torch.cuda.device(self._memory.device_index), torch.cuda.stream(self._digest_stream):
                self._digest_stream.wait_stream(self._pulling)
                checksums.launch(blocks)
        except RuntimeError as error:  # a part of it may run still, so its room is not used again
            logger.warning("cannot digest what is copied from a peer's pool: %s", error)
            return None
        cudart.record(event, self._digest_stream.cuda_stream)
        return checksums

    def _measure(self, pointer: int, exported: Exported) -> None:
        """The self-test: pull into memory of its own, never into blocks that someone may own."""
        size_bytes = min(PROBE_BYTES, exported.size_bytes)
        try:
            with torch.cuda.device(self._memory.device_index):
                scratch = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
                torch.cuda.current_stream().synchronize()
        except torch.cuda.OutOfMemoryError:
            return
        begin, end = cudart.create_event(timing=True), cudart.create_event(timing=True)
        for event in (begin, begin, end):  # the first copy sets the path up
            cudart.record(event, self._stream)
            if event == begin:
                cudart.copy_async(scratch.data_ptr(), pointer, size_bytes, self._stream)
        self._pulling.synchronize()
        self._self_test.report("cuda_ipc", size_bytes, cudart.elapsed_s(begin, end))
        cudart.destroy_event(begin)
        cudart.destroy_event(end)
