"""The data planes of pools in host memory: over whole blocks and, between workers of which one has stages, by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.kvtransfer.blocks.memory import SharedBlockMemory
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import LayerMemory
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.sharded import LayersDigest, ShardedPlane, rank_name
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.kvtransfer.reshard import Cut
from baton.node.addresses import ListenHost
from baton.node.sockets import Context

PLANES = ("shm", "zmq")
"""Best first."""
MakePlane = Callable[[str, SharedBlockMemory, str], Plane]
"""Of its name, the memory behind it, and the identity of the end."""


def plane_maker(context: Context, host: ListenHost) -> MakePlane:
    def make(name: str, memory: SharedBlockMemory, identity: str) -> Plane:
        return ShmPlane(memory) if name == "shm" else ZmqPlane(context, memory, identity, host)

    return make


def planes_by_layer(
    cut: Cut,
    pools: Sequence[BlockPool],
    digest: LayersDigest,
    names: Sequence[str],
    make: MakePlane,
    identity: str,
) -> list[Plane]:
    """Over the pools of the stages of `cut`, of which one is all of a worker without stages."""
    memories = [LayerMemory(pool) for pool in pools]
    return [
        ShardedPlane(
            cut,
            pools[0].num_blocks,
            [make(name, memory, rank_name(identity, number)) for number, memory in enumerate(memories)],
            digest,
        )
        for name in names
        if name != "shm" or all(pool.shared is not None for pool in pools)
    ]
