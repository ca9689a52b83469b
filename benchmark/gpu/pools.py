"""Pools that planes.py moves blocks of: 1 GiB in blocks of 1 MiB, on a GPU or in host memory, filled at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import xxhash

from baton.kvtransfer.planes.base import Plane
from baton.node.addresses import LOOPBACK
from baton.node.sockets import Context

MIB = 1 << 20
POOL_BLOCKS = 1024
HOST, HOST_PLANES = "host", ("shm", "zmq")


class TransferPool(Protocol):
    """A pool that can be filled, compared by digest, and served by a plane."""

    def fill(self, seed: int) -> None:
        """Random bytes, the same for a seed."""
        ...

    def poison(self) -> None: ...

    def digest(self, blocks: Sequence[int]) -> bytes: ...

    def plane(self, kind: str, ctas: int, context: Context, name: str) -> Plane: ...


def make_pool(where: str) -> TransferPool:
    """On GPU number `where`, or "host"."""
    return HostPool() if where == HOST else GpuPool(int(where))


class GpuPool:
    def __init__(self, gpu: int) -> None:
        # They need CUDA, which a machine for the host's planes may lack.
        from baton.kvtransfer.blocks.device_pool import DeviceMemory
        from baton.kvtransfer.blocks.digest import BlockDigests

        self._memory = DeviceMemory(POOL_BLOCKS, MIB, gpu)
        self._digests = BlockDigests(self._memory.data)

    def fill(self, seed: int) -> None:
        generator = torch.Generator(self._memory.data.device).manual_seed(seed)
        self._memory.data.view(-1).random_(0, 256, generator=generator)
        torch.cuda.synchronize(self._memory.device_index)

    def poison(self) -> None:
        self._memory.data.fill_(0xA5)
        torch.cuda.synchronize(self._memory.device_index)

    def digest(self, blocks: Sequence[int]) -> bytes:
        return self._digests.digest(blocks)

    def plane(self, kind: str, ctas: int, context: Context, name: str) -> Plane:
        from baton.kvtransfer.planes.device import device_planes

        (plane,) = device_planes(self._memory, context, name, LOOPBACK, names=(kind,), nccl_ctas=ctas)
        return plane


class HostPool:
    def __init__(self) -> None:
        from baton.kvtransfer.blocks.memory import HostMemory

        self._memory = HostMemory(POOL_BLOCKS, MIB)
        self._bytes = np.frombuffer(self._memory.view, np.uint8)

    def fill(self, seed: int) -> None:
        self._bytes.view(np.uint64)[:] = np.random.default_rng(seed).integers(1 << 63, size=len(self._bytes) // 8)

    def poison(self) -> None:
        self._bytes.fill(0xA5)

    def digest(self, blocks: Sequence[int]) -> bytes:
        state = xxhash.xxh3_128()
        for block in blocks:
            state.update(self._memory.block(block))
        return state.digest()

    def plane(self, kind: str, ctas: int, context: Context, name: str) -> Plane:
        from baton.kvtransfer.planes.shm import ShmPlane
        from baton.kvtransfer.planes.zeromq import ZmqPlane

        return ShmPlane(self._memory) if kind == "shm" else ZmqPlane(context, self._memory, name, LOOPBACK)
