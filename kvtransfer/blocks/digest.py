"""Digests of blocks that lie in device memory, computed there by a kernel: 8 bytes a block come to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from kernels.checksum import WORD_BYTES
from kernels.triton.blocks import block_checksums, checksum_scratch
from node.errors import InvariantBroken

__all__ = ["WORD_BYTES", "BlockDigests"]


class BlockDigests:
    """Digests of the blocks of one allocation; `kernels.checksum` defines the checksum that they are made of."""

    MAX_BLOCKS = 1024
    """In one launch; more take several."""

    def __init__(self, data: torch.Tensor) -> None:
        """`data`: uint8 [num_blocks, block_bytes], block_bytes a multiple of 8."""
        self._data = data
        on_gpu = data.is_cuda
        self._scratch = checksum_scratch(self.MAX_BLOCKS, data)
        self._ids = torch.empty(self.MAX_BLOCKS, dtype=torch.int64, device=data.device)
        self._sums = torch.empty(self.MAX_BLOCKS, dtype=torch.int64, device=data.device)
        self._host_ids = torch.empty(self.MAX_BLOCKS, dtype=torch.int64, pin_memory=on_gpu)
        self._host_sums = torch.empty(self.MAX_BLOCKS, dtype=torch.int64, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(data.device, priority=-1) if on_gpu else None  # before what computes
        if on_gpu:
            torch.cuda.synchronize(data.device)
        self.digest([0])  # loads the kernels, which later would wait for the whole device: NCCL may spin there

    def digest(self, blocks: Sequence[int]) -> bytes:
        """xxh3-128 over the checksums of these blocks in this order, 16 bytes: finds corruption, proves no identity.

        On a GPU it waits for its own side stream alone: for about the time of reading the blocks.
        """
        for block in blocks:
            if not 0 <= block < len(self._data):
                raise InvariantBroken(f"block {block} of a pool of {len(self._data)}")
        state = xxhash.xxh3_128()
        for start in range(0, len(blocks), self.MAX_BLOCKS):
            state.update(self._checksums(blocks[start : start + self.MAX_BLOCKS]))
        return state.digest()

    def _checksums(self, blocks: Sequence[int]) -> bytes:
        """8 bytes a block."""
        if self._stream is None:
            return self._run(blocks)
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            return self._run(blocks)

    def _run(self, blocks: Sequence[int]) -> bytes:
        count = len(blocks)
        self._host_ids[:count] = torch.tensor(blocks, dtype=torch.int64)
        self._ids[:count].copy_(self._host_ids[:count], non_blocking=True)
        block_checksums(self._data, self._ids[:count], self._scratch, self._sums[:count])
        self._host_sums[:count].copy_(self._sums[:count], non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()  # wanted: the protocol needs the digest before it may go on
        return self._host_sums[:count].numpy().tobytes()
