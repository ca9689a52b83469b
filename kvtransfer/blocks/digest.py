"""Digests of blocks that lie in device memory, computed there in torch ops: the bytes never come to the host.

Runs on any device; a kernel that replaces it must give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from node.errors import InvariantBroken

WORD_BYTES = 8


class BlockDigests:
    """Digests of blocks that lie in device memory, computed there; 8 bytes a block come to the host.

    The checksum of a block of words w_0, w_1, ... (64 bits) is sum(w_i * m_i) mod 2^64 with m_i odd and pseudo-random
    (SplitMix64 of i; Steele, Lea, Flood 2014). As an odd m_i has an inverse, a change of one word always shows; words
    that changed places, or several damaged ones, go unseen with a probability of about 2^-63.
    Sums of integers do not depend on the order, so any two kernels agree bit for bit.
    """

    MAX_BLOCKS = 1024
    """In one readback; more are read in several."""

    def __init__(self, data: torch.Tensor) -> None:
        """`data`: uint8 [num_blocks, block_bytes], block_bytes a multiple of 8, on the CPU or on a GPU."""
        self._words = data.view(-1).view(torch.int64).view(data.shape[0], -1)  # [num_blocks, words]
        self._weights = weights(self._words.shape[1]).to(data.device)  # [words]
        self._scratch = torch.empty_like(self._weights)  # [words]
        self._sums = torch.empty(self.MAX_BLOCKS, dtype=torch.int64, device=data.device)
        on_gpu = data.is_cuda
        self._host = torch.empty(self.MAX_BLOCKS, dtype=torch.int64, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(data.device, priority=0) if on_gpu else None
        if on_gpu:
            torch.cuda.synchronize(data.device)
        self.digest([0])  # loads the kernels, which later would wait for the whole device: NCCL may spin there

    def digest(self, blocks: Sequence[int]) -> bytes:
        """xxh3-128 over the checksums of these blocks in this order, 16 bytes: finds corruption, proves no identity.

        On a GPU it waits for its own side stream alone: for about the time of reading the blocks.
        """
        for block in blocks:
            if not 0 <= block < len(self._words):
                raise InvariantBroken(f"block {block} of a pool of {len(self._words)}")
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
        for row, block in enumerate(blocks):
            torch.mul(self._words[block], self._weights, out=self._scratch)
            torch.sum(self._scratch, dim=0, out=self._sums[row])
        self._host[: len(blocks)].copy_(self._sums[: len(blocks)], non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()  # wanted: the protocol needs the digest before it may go on
        return self._host[: len(blocks)].numpy().tobytes()


def weights(num_words: int) -> torch.Tensor:
    """The odd multipliers m_i = SplitMix64(i) | 1 as int64 [num_words], on the CPU."""
    z = (torch.arange(num_words, dtype=torch.int64) + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shift_right(z, 31)) | 1


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The logical shift, which int64 has not."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
