"""The memory behind the block ids of one rank on the CPU: one allocation that other processes of the host can map.

Knows bytes, not the owners of blocks. On a GPU it is device_pool.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.kvtransfer.blocks.checksum import digest_of_sums, xxh3_sums
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.memory import HostMemory, SharedFile
from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.node.errors import InvariantBroken


class BlockPool:
    """`num_blocks` zeroed blocks of `layout`. Meets SharedBlockMemory, so that data planes need no torch."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_units = layout.num_units
        self.block_bytes = layout.block_bytes
        self._memory = HostMemory(num_blocks, self.block_bytes, self.num_units)
        # frombuffer keeps the memoryview, and with it the mapping, for as long as any view of the tensor lives
        flat = torch.frombuffer(self._memory.view, dtype=torch.uint8)
        self._tensors: KvTensors | None = kv_tensors(flat, layout, num_blocks)

    @property
    def tensor(self) -> torch.Tensor:
        """All blocks: [num_blocks, num_units, num_layers, planes, block_tokens, head_dim]."""
        return self._opened().data

    @property
    def scales(self) -> torch.Tensor | None:
        """Where blocks have them inside: float32 [num_blocks, num_units, num_layers, planes, block_tokens]."""
        return self._opened().scales

    @property
    def shared(self) -> SharedFile | None:
        """How a process of this host maps the pool; None where it cannot."""
        return self._memory.shared

    def block(self, index: int) -> memoryview:
        """The writable bytes of one block, [block_bytes]."""
        return self._memory.block(index)

    def unit_parts(self, index: int) -> list[list[memoryview]]:
        """The writable bytes of each unit of one block, in one part each: see copies.UnitBytes."""
        return self._memory.unit_parts(index)

    def write(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Replace a block's bytes. Raises ValueError unless there are exactly `block_bytes`."""
        if len(data) != self.block_bytes:
            raise ValueError(f"{len(data)} bytes for a block of {self.block_bytes}")
        self.block(index)[:] = data

    def digest(self, blocks: Sequence[int]) -> bytes:
        """The digest ("xxh3") of the units of these blocks in this order: finds corruption, proves no identity."""
        return digest_of_sums(xxh3_sums(self.block(block), self.num_units) for block in blocks)

    def layers_digest(self, blocks: Sequence[int]) -> bytes:
        """The same over the layers of these units: for layouts without padding."""
        num_layers = self.num_units * self.layout.num_layers
        return digest_of_sums(xxh3_sums(self.block(block), num_layers) for block in blocks)

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """The digest of each of these chunks."""
        return [self.digest(blocks) for blocks in chunks]

    def close(self) -> None:
        """Give the memory back; what still views it keeps it mapped. May be repeated."""
        self._tensors = None
        self._memory.close()

    def _opened(self) -> KvTensors:
        if self._tensors is None:
            raise InvariantBroken("a pool is used after it was closed")
        return self._tensors
