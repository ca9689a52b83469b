"""Digests of blocks that lie in device memory, computed there by a kernel: 8 bytes a row come to the host.

A row is a unit or, where stages share out the layers, a layer of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import gcd
from typing import NamedTuple, Protocol

import numpy as np
import torch
import xxhash

from baton.kernels.triton.blocks import BlockChecksums, checksum_scratch
from baton.kvtransfer.blocks.checksum import WORD_BYTES
from baton.node.errors import InvariantBroken

MAX_ROWS = 65_535
"""In one launch: the size of a grid's second dimension."""


class UnitRows(NamedTuple):
    """What of a unit is summed up: so many rows from its begin on, one behind the other."""

    num_rows: int
    row_bytes: int
    first_byte: int | None = None
    """Of a larger unit, of which the row is a part: sums are of its terms (checksum.checksums_of_parts)."""


class Checksums:
    """Room for the checksums of all rows of up to `max_blocks` blocks of one allocation; `checksum.py` defines them.

    `launch` and `result` follow each other: between them the GPU gets as far as the kernel.
    """

    def __init__(self, data: torch.Tensor, max_blocks: int, rows: UnitRows | None = None) -> None:
        """`data`: uint8 [num_blocks, num_units, unit_bytes]; rows, each a unit if not given, and units have a multiple
        of WORD_BYTES."""
        self._num_blocks, num_units, unit_bytes = data.shape
        num_rows, row_bytes, first_byte = rows or UnitRows(1, unit_bytes)
        step = gcd(unit_bytes, row_bytes) if num_rows > 1 else unit_bytes
        steps = data.view(-1, step)  # rows begin at these
        self._steps_per_block = num_units * unit_bytes // step
        first_rows = np.arange(0, self._steps_per_block, unit_bytes // step)
        self._places = (first_rows[:, None] + np.arange(num_rows) * (row_bytes // step)).ravel()  # in a block
        self.max_blocks = min(max_blocks, MAX_ROWS // len(self._places))
        most = self.max_blocks * len(self._places)
        scratch = checksum_scratch(most, steps, row_bytes)
        self._ids = torch.empty(most, dtype=torch.int64, device=data.device)
        self._sums = torch.empty(most, dtype=torch.int64, device=data.device)
        self._host_ids = torch.empty(most, dtype=torch.int64, pin_memory=data.is_cuda)
        self._host_sums = torch.empty(most, dtype=torch.int64, pin_memory=data.is_cuda)
        self._host_places = self._host_ids.numpy()
        self._make_sums = BlockChecksums(steps, self._ids, scratch, self._sums, row_bytes, first_byte)
        self._count = 0

    @property
    def block_sums_bytes(self) -> int:
        """Bytes of the sums of one block."""
        return len(self._places) * WORD_BYTES

    def launch(self, blocks: Sequence[int]) -> None:
        """On torch's current stream."""
        if min(blocks, default=0) < 0 or max(blocks, default=0) >= self._num_blocks:
            raise InvariantBroken(f"blocks {list(blocks)} of a pool of {self._num_blocks}")
        self._count = count = len(blocks) * len(self._places)
        firsts = np.array(blocks, dtype=np.int64) * self._steps_per_block
        self._host_places[:count] = (firsts[:, None] + self._places).ravel()
        self._ids[:count].copy_(self._host_ids[:count], non_blocking=True)
        self._make_sums(count)
        self._host_sums[:count].copy_(self._sums[:count], non_blocking=True)

    def result(self) -> bytes:
        """The sums of the last launch, when its stream has got so far: WORD_BYTES a row, block by block."""
        return self._host_sums[: self._count].numpy().tobytes()

    def digest(self) -> bytes:
        """The same as one digest: that of BlockDigests.digest."""
        return xxhash.xxh3_128_digest(self.result())

    def digests(self) -> list[bytes]:
        """The same as digests of one block each, those that `checksum.sum64` makes on the host."""
        sums, size = self.result(), self.block_sums_bytes
        return [xxhash.xxh3_128_digest(sums[at : at + size]) for at in range(0, len(sums), size)]


class BlockDigests:
    """Digests of the blocks of one allocation."""

    MAX_BLOCKS = 1024
    """In one launch; more take several."""

    def __init__(self, data: torch.Tensor, rows: UnitRows | None = None) -> None:
        """As Checksums."""
        self._checksums = Checksums(data, self.MAX_BLOCKS, rows)
        self._stream = torch.cuda.Stream(data.device, priority=-1) if data.is_cuda else None  # before what computes
        if data.is_cuda:
            torch.cuda.synchronize(data.device)
        self.digest([0])  # loads the kernels, which later would wait for the whole device: NCCL may spin there

    def digest(self, blocks: Sequence[int]) -> bytes:
        """The digest ("sum64") of the rows of these blocks in this order: finds corruption, proves no identity.

        On a GPU it waits for its own side stream alone: for about the time of reading the blocks.
        """
        return self.digests([blocks])[0]

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """The same for several chunks, which wait together: beside steps of prompts each wait is long."""
        sums, size = (
            memoryview(self.sums([block for blocks in chunks for block in blocks])),
            self._checksums.block_sums_bytes,
        )
        ends = accumulate(len(blocks) * size for blocks in chunks)
        return [
            xxhash.xxh3_128_digest(sums[end - len(blocks) * size : end])
            for blocks, end in zip(chunks, ends, strict=True)
        ]

    def sums(self, blocks: Sequence[int]) -> bytes:
        """Checksums of the rows of these blocks, WORD_BYTES each, block by block; waits as `digest` does."""
        sums = bytearray()
        for start in range(0, len(blocks), self._checksums.max_blocks):
            sums += self.begin_sums(blocks[start : start + self._checksums.max_blocks])()
        return bytes(sums)

    def begin_sums(self, blocks: Sequence[int]) -> Callable[[], bytes]:
        """What waits for them, and is called before anything else is: other GPUs may make theirs meanwhile."""
        if len(blocks) > self._checksums.max_blocks:
            return lambda: self.sums(blocks)
        self._launch(blocks)

        def read() -> bytes:
            self._wait()
            return self._checksums.result()

        return read

    def each(self, blocks: Sequence[int]) -> list[bytes]:
        """The digest of each block alone; waits as `digest` does, once for MAX_BLOCKS of them."""
        digests: list[bytes] = []
        for start in range(0, len(blocks), self._checksums.max_blocks):
            self._launch(blocks[start : start + self._checksums.max_blocks])
            self._wait()
            digests += self._checksums.digests()
        return digests

    def _launch(self, blocks: Sequence[int]) -> None:
        if self._stream is None:
            self._checksums.launch(blocks)
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._checksums.launch(blocks)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()  # wanted: the protocol needs the digest before it may go on


class Waitable(Protocol):
    """A place in a stream of device work: models.cuda.queue.QueueMark, as it is used here."""

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
        self._max_blocks = self._free[0].max_blocks
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
            size = checksums.block_sums_bytes
            return {block: sums[size * i :][:size] for i, block in enumerate(blocks)}

        return read
