"""The memory behind the block ids of one rank: one allocation, block-first. Knows bytes, not who owns which block.

On CPU the memory is host memory that other processes of the host can map (memory.py), and blocks are also reachable as
memoryviews. On any other device it is a plain tensor for now.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.memory import HostMemory, SharedFile
from baton.node.errors import InvariantBroken


class BlockPool:
    """`num_blocks` zeroed blocks of `layout`. Meets SharedBlockMemory, so that data planes need no torch."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: str = "cpu") -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        self.device = device
        dtype: torch.dtype = getattr(torch, layout.dtype)  # a key of DTYPE_BYTES, never text of a peer
        shape = layout.shape(num_blocks)  # [num_blocks, num_layers, 2, block_tokens, kv_heads, head_dim]
        self._memory: HostMemory | None = None
        self._tensor: torch.Tensor | None
        if torch.device(device).type == "cpu":
            self._memory = HostMemory(num_blocks, self.block_bytes)
            # frombuffer keeps the memoryview, and with it the mapping, for as long as any view of the tensor lives
            self._tensor = torch.frombuffer(self._memory.view, dtype=dtype).view(shape)
        else:
            self._tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def tensor(self) -> torch.Tensor:
        """All blocks: [num_blocks, num_layers, 2, block_tokens, kv_heads, head_dim]."""
        if self._tensor is None:
            raise InvariantBroken("a pool is used after it was closed")
        return self._tensor

    @property
    def shared(self) -> SharedFile | None:
        """How a process of this host maps the pool; None where it cannot."""
        return self._memory.shared if self._memory else None

    def block(self, index: int) -> memoryview:
        """The writable bytes of one block, [block_bytes]; host memory only."""
        if self._memory is None:
            raise InvariantBroken(f"blocks on {self.device} have no host bytes")
        return self._memory.block(index)

    def write(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Replace a block's bytes. Raises ValueError unless there are exactly `block_bytes`."""
        if len(data) != self.block_bytes:
            raise ValueError(f"{len(data)} bytes for a block of {self.block_bytes}")
        self.block(index)[:] = data

    def digest(self, blocks: Sequence[int]) -> bytes:
        """xxh3-128 over the bytes of these blocks in this order, 16 bytes: finds corruption, proves no identity."""
        state = xxhash.xxh3_128()
        for block in blocks:
            state.update(self.block(block))
        return state.digest()

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """The digest of each of these chunks."""
        return [self.digest(blocks) for blocks in chunks]

    def close(self) -> None:
        """Give the memory back; what still views it keeps it mapped. May be repeated."""
        self._tensor = None
        if self._memory:
            self._memory.close()
