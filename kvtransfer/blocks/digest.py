"""Digests of blocks that lie in device memory, computed there by a kernel: 8 bytes a block come to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import xxhash

from baton.kernels.triton.blocks import block_checksums, checksum_scratch
from baton.kvtransfer.blocks.checksum import WORD_BYTES
from baton.node.errors import InvariantBroken


class Checksums:
    """Room for the checksums of up to `max_blocks` blocks of one allocation; `checksum.py` defines them.

    `launch` and `result` follow each other: between them the GPU gets as far as the kernel.
    """

    def __init__(self, data: torch.Tensor, max_blocks: int) -> None:
        """`data`: uint8 [num_blocks, block_bytes], block_bytes a multiple of WORD_BYTES."""
        self.max_blocks = max_blocks
        self._data = data
        self._scratch = checksum_scratch(max_blocks, data)
        self._ids = torch.empty(max_blocks, dtype=torch.int64, device=data.device)
        self._sums = torch.empty(max_blocks, dtype=torch.int64, device=data.device)
        self._host_ids = torch.empty(max_blocks, dtype=torch.int64, pin_memory=data.is_cuda)
        self._host_sums = torch.empty(max_blocks, dtype=torch.int64, pin_memory=data.is_cuda)
        self._count = 0

    def launch(self, blocks: Sequence[int]) -> None:
        """On torch's current stream."""
        if any(not 0 <= block < len(self._data) for block in blocks):
            raise InvariantBroken(f"blocks {list(blocks)} of a pool of {len(self._data)}")
        self._count = count = len(blocks)
        self._host_ids[:count] = torch.tensor(blocks, dtype=torch.int64)
        self._ids[:count].copy_(self._host_ids[:count], non_blocking=True)
        block_checksums(self._data, self._ids[:count], self._scratch, self._sums[:count])
        self._host_sums[:count].copy_(self._sums[:count], non_blocking=True)

    def result(self) -> bytes:
        """Of the last launch, when its stream has got so far: WORD_BYTES a block."""
        return self._host_sums[: self._count].numpy().tobytes()

    def digest(self) -> bytes:
        """The same as one digest: that of BlockDigests.digest."""
        return xxhash.xxh3_128_digest(self.result())

    def digests(self) -> list[bytes]:
        """The same as digests of one block each, those that `checksum.sum64` makes on the host."""
        sums = self.result()
        return [xxhash.xxh3_128_digest(sums[at : at + WORD_BYTES]) for at in range(0, len(sums), WORD_BYTES)]


class BlockDigests:
    """Digests of the blocks of one allocation."""

    MAX_BLOCKS = 1024
    """In one launch; more take several."""

    def __init__(self, data: torch.Tensor) -> None:
        """`data`: as for Checksums."""
        self._checksums = Checksums(data, self.MAX_BLOCKS)
        self._stream = torch.cuda.Stream(data.device, priority=-1) if data.is_cuda else None  # before what computes
        if data.is_cuda:
            torch.cuda.synchronize(data.device)
        self.digest([0])  # loads the kernels, which later would wait for the whole device: NCCL may spin there

    def digest(self, blocks: Sequence[int]) -> bytes:
        """xxh3-128 over the checksums of these blocks in this order, 16 bytes: finds corruption, proves no identity.

        On a GPU it waits for its own side stream alone: for about the time of reading the blocks.
        """
        return self.digests([blocks])[0]

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """The same for several chunks, which wait together: beside steps of prompts each wait is long."""
        sums = memoryview(self._sums([block for blocks in chunks for block in blocks]))
        ends = accumulate(len(blocks) * WORD_BYTES for blocks in chunks)
        return [
            xxhash.xxh3_128_digest(sums[end - len(blocks) * WORD_BYTES : end])
            for blocks, end in zip(chunks, ends, strict=True)
        ]

    def _sums(self, blocks: Sequence[int]) -> bytes:
        """WORD_BYTES a block."""
        sums = bytearray()
        for start in range(0, len(blocks), self._checksums.max_blocks):
            self._run(blocks[start : start + self._checksums.max_blocks])
            sums += self._checksums.result()
        return bytes(sums)

    def each(self, blocks: Sequence[int]) -> list[bytes]:
        """The digest of each block alone; waits as `digest` does, once for MAX_BLOCKS of them."""
        digests: list[bytes] = []
        for start in range(0, len(blocks), self._checksums.max_blocks):
            self._run(blocks[start : start + self._checksums.max_blocks])
            digests += self._checksums.digests()
        return digests

    def _run(self, blocks: Sequence[int]) -> None:
        if self._stream is None:
            self._checksums.launch(blocks)
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._checksums.launch(blocks)
            self._stream.synchronize()  # wanted: the protocol needs the digest before it may go on


class Waitable(Protocol):
    """models.cuda.queue.Mark, as it is used here."""

    def wait(self) -> None: ...


class SumsBehind:
    """Checksums of the blocks that a step completes, made behind it on the steps' own stream: they are there when the
    step is, and do not wait for the multiprocessors that the next one holds. See worker.parts.Sums."""

    def __init__(
        self,
        data: torch.Tensor,
        max_blocks: int,
        in_flight: int,
        enqueue: Callable[[Callable[[], None]], None],
        mark: Callable[[], Waitable],
    ) -> None:
        """`data`: as for Checksums. `enqueue`, `mark`: of the steps' queue."""
        self._free = [Checksums(data, max_blocks) for _ in range(in_flight)]
        self._max_blocks = max_blocks
        self._enqueue, self._mark = enqueue, mark

    def begin(self, blocks: Sequence[int]) -> Callable[[], dict[int, bytes]]:
        if not self._free or not 0 < len(blocks) <= self._max_blocks:
            return dict
        checksums = self._free.pop()
        self._enqueue(lambda: checksums.launch(blocks))
        mark = self._mark()

        def read() -> dict[int, bytes]:
            mark.wait()
            sums = checksums.result()
            self._free.append(checksums)
            return {block: sums[WORD_BYTES * i :][:WORD_BYTES] for i, block in enumerate(blocks)}

        return read
