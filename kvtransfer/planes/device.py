"""The data planes of a pool on a GPU, best first: cuda_ipc within a host, nccl wherever two GPUs are. Needs a GPU.

Blocks on a GPU are not offered over ZeroMQ or shared memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from baton.kvtransfer.blocks import cudart
from baton.kvtransfer.blocks.device_pool import DeviceLayerMemory, DevicePool, PoolMemory
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.communicator import NcclConnector
from baton.kvtransfer.planes.cuda_ipc import CudaIpcPlane
from baton.kvtransfer.planes.nccl import NcclPlane
from baton.kvtransfer.planes.pull_engine import CudaPullEngine
from baton.kvtransfer.planes.self_test import SelfTest
from baton.kvtransfer.planes.sharded import LayersDigest, ShardedPlane
from baton.kvtransfer.reshard import Cut
from baton.node.addresses import ListenHost
from baton.node.settings import is_loopback_host
from baton.node.sockets import Context
from baton.node.telemetry import log_event

logger = logging.getLogger("kvtransfer.planes")

NCCL_CTAS = 16
"""About 233 GB/s in chunks of 64 MiB between two H200s. Twice as fast as 8, at the same cost to the decode steps beside
it (docs/benchmarks/planes.md)."""


def device_planes(
    memory: PoolMemory,
    context: Context,
    identity: str,
    host: ListenHost,
    *,
    names: tuple[str, ...] = ("cuda_ipc", "nccl"),
    nccl_ctas: int = NCCL_CTAS,
    warm: bool = False,
) -> list[Plane]:
    """Those of `names`, in this order. `warm`: this worker sends, so communicators are made before the first use."""
    self_test = SelfTest(cudart.device_name(memory.device_index), nccl_ctas)
    planes: list[Plane] = []
    for name in names:
        if name == "cuda_ipc":
            planes.append(CudaIpcPlane(CudaPullEngine(memory, self_test)))
        elif name == "nccl":
            loopback = is_loopback_host(host.bound)
            connector = NcclConnector(memory, self_test, max_ctas=nccl_ctas, loopback=loopback)
            planes.append(NcclPlane(context, connector, identity, host, warm=warm))
    log_event(logger, "planes_offered", planes=",".join(plane.name for plane in planes), gpu=self_test.gpu_name)
    return planes


def device_plane_by_layer(cut: Cut, pools: Sequence[DevicePool], digest: LayersDigest) -> Plane:
    """Within a host, over the pools of the ranks of `cut` in order, stage by stage; one is all of a worker on one GPU.
    Waits until kernels for digests are loaded."""
    digest([0])  # later that would wait for the whole device
    ends = [
        CudaIpcPlane(
            CudaPullEngine(
                DeviceLayerMemory(pool.memory, pool.layout), SelfTest(cudart.device_name(pool.memory.device_index))
            )
        )
        for pool in pools
    ]
    return ShardedPlane(cut, pools[0].num_blocks, ends, digest)
