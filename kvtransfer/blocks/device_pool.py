"""The memory behind the block ids of one rank on a GPU: one plain allocation, block-first, which others can map.

`DeviceMemory` is its bytes, `DevicePool` the tensor and the digest over it. The allocation is cudaMalloc's own, not
torch's: CUDA IPC exports whole allocations, and those of torch's expandable segments not at all. Behind the payload
lies a random nonce, by which a process that opened the allocation knows that it opened the right one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.checksum import WORD_BYTES, digest_of_sums
from baton.kvtransfer.blocks.digest import BlockDigests, UnitRows
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.runs import RowSpacing
from baton.kvtransfer.blocks.views import KvTensors, kv_tensors
from baton.node.errors import InvariantBroken, SettingsError

NONCE_BYTES = 16


class DeviceMemory:
    """Zeroed memory of `num_blocks` blocks on GPU `device_index`; block i lies at i * block_bytes."""

    def __init__(self, num_blocks: int, block_bytes: int, device_index: int, num_units: int = 1) -> None:
        """Raises SettingsError if the GPU has no room for it."""
        if num_blocks < 1 or block_bytes < 1 or block_bytes % num_units:
            raise ValueError(f"memory for {num_blocks} blocks of {num_units} units in {block_bytes} bytes")
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.num_units = num_units
        self.rows = RowSpacing.even(block_bytes)
        self.payload_bytes = num_blocks * block_bytes
        self.device_index = device_index
        self.device_uuid = cudart.device_uuid(device_index)
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        torch.empty(1, device=f"cuda:{device_index}")  # torch makes the context
        cudart.use_device(device_index)
        try:
            self._pointer = cudart.allocate(self.payload_bytes + NONCE_BYTES)
        except cudart.CudaError as error:
            gib = self.payload_bytes / (1 << 30)
            raise SettingsError(f"a KV pool of {gib:.2f} GiB does not fit on GPU {device_index}: {error}") from None
        cudart.fill_zero(self._pointer, self.payload_bytes)
        staged = torch.frombuffer(bytearray(self.nonce), dtype=torch.uint8)
        cudart.copy(self._pointer + self.payload_bytes, staged.data_ptr(), NONCE_BYTES)
        self.handle = cudart.export_handle(self._pointer)

    @property
    def pointer(self) -> int:
        """The device address of block 0."""
        if not self._pointer:
            raise InvariantBroken("device memory is used after it was closed")
        return self._pointer

    @property
    def data(self) -> torch.Tensor:
        """All blocks as uint8 [num_blocks, num_units, unit_bytes]; it does not keep the memory alive."""
        array = _CudaArray(self.pointer, self.payload_bytes)
        flat = torch.as_tensor(array, device=f"cuda:{self.device_index}")
        assert flat.data_ptr() == self.pointer, "torch made a copy of the pool"
        return flat.view(self.num_blocks, self.num_units, -1)

    def close(self) -> None:
        """Give the memory back. No tensor over it may be used, and no peer may read it, after that. May be repeated."""
        if self._pointer:
            cudart.use_device(self.device_index)
            cudart.free(self._pointer)
            self._pointer = 0


class UnitMemory:
    """A DeviceMemory as one of units: unit u of block b is block b * num_units + u here. Ranks exchange these."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self.num_blocks = memory.num_blocks * memory.num_units
        self.block_bytes = memory.block_bytes // memory.num_units
        self.num_units = 1
        self.rows = RowSpacing.even(self.block_bytes)
        self.payload_bytes, self.nonce, self.handle = memory.payload_bytes, memory.nonce, memory.handle
        self.device_index, self.device_uuid = memory.device_index, memory.device_uuid

    @property
    def pointer(self) -> int:
        return self._memory.pointer

    @property
    def data(self) -> torch.Tensor:
        """As DeviceMemory.data: uint8 [units, 1, unit_bytes]."""
        return self._memory.data.view(self.num_blocks, 1, -1)


class DeviceLayerMemory:
    """A DeviceMemory as one of layers, wherever padding lies: layer l of unit u of block b is block
    (b * units + u) * layers + l here. Workers with stages exchange these."""

    def __init__(self, memory: DeviceMemory, layout: KVLayout) -> None:
        self._memory = memory
        self.num_blocks = memory.num_blocks * layout.num_units * layout.num_layers
        self.rows = RowSpacing(layout.layer_bytes, layout.num_layers, layout.unit_bytes)
        self.payload_bytes, self.nonce, self.handle = memory.payload_bytes, memory.nonce, memory.handle
        self.device_index, self.device_uuid = memory.device_index, memory.device_uuid

    @property
    def pointer(self) -> int:
        return self._memory.pointer


PoolMemory = DeviceMemory | UnitMemory


def mapped(handle: bytes, size_bytes: int, device_index: int) -> torch.Tensor:
    """uint8 [size_bytes]: memory of another process on this GPU, which `DeviceMemory.handle` names. It stays mapped."""
    cudart.use_device(device_index)
    pointer = cudart.open_handle(handle)
    found = torch.as_tensor(_CudaArray(pointer, size_bytes), device=f"cuda:{device_index}")
    assert found.data_ptr() == pointer, "torch made a copy of the memory"
    return found


class DevicePool:
    """`num_blocks` zeroed blocks of `layout` on one GPU: BlockPool's twin."""

    def __init__(self, layout: KVLayout, num_blocks: int, device_index: int) -> None:
        """Raises SettingsError if there is no room, or if a unit is not made of whole 64-bit words."""
        if layout.unit_bytes % WORD_BYTES:
            raise SettingsError(f"a unit of {layout.unit_bytes} bytes is not made of words of {WORD_BYTES}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        self.device = f"cuda:{device_index}"
        self.memory = DeviceMemory(num_blocks, layout.block_bytes, device_index, layout.num_units)
        self._tensors: KvTensors | None = kv_tensors(self.memory.data.view(-1), layout, num_blocks)
        self._digests = BlockDigests(self.memory.data)
        self._layer_digests: BlockDigests | None = None  # of workers that have peers with stages

    @property
    def tensors(self) -> KvTensors:
        return self._opened()

    @property
    def tensor(self) -> torch.Tensor:
        """All blocks: [num_blocks, num_units, num_layers, planes, block_tokens, head_dim]."""
        return self._opened().data

    @property
    def scales(self) -> torch.Tensor | None:
        """Where blocks have them inside: float32 [num_blocks, num_units, num_layers, planes, block_tokens]."""
        return self._opened().scales

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]:
        """See BlockDigests.digests; what was written to these blocks must be complete on the GPU."""
        self._opened()
        return self._digests.digests(chunks)

    def unit_sums(self, blocks: Sequence[int]) -> bytes:
        """See BlockDigests.sums."""
        self._opened()
        return self._digests.sums(blocks)

    def begin_layer_sums(self, blocks: Sequence[int]) -> Callable[[], bytes]:
        """See layer_digests.LayerPool. The first call takes seconds."""
        self._opened()
        if self._layer_digests is None:
            rows = UnitRows(self.layout.num_layers, self.layout.layer_bytes)
            self._layer_digests = BlockDigests(self.memory.data, rows)
        return self._layer_digests.begin_sums(blocks)

    def layers_digest(self, blocks: Sequence[int]) -> bytes:
        """See layer_digests.layer_digests."""
        return digest_of_sums([self.begin_layer_sums(blocks)()])

    def close(self) -> None:
        """Give the memory back; views of the tensor are invalid from then on. May be repeated."""
        self._tensors = None
        self.memory.close()

    def _opened(self) -> KvTensors:
        if self._tensors is None:
            raise InvariantBroken("a pool is used after it was closed")
        return self._tensors


class _CudaArray:
    """Device memory as torch.as_tensor takes it: the CUDA array interface, version 3 (Numba's documentation)."""

    def __init__(self, pointer: int, size_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }
