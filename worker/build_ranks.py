"""A model on several GPUs, one a rank: rank 0's process has the pools of all and the planes between them.

What a rank does on its GPU is in worker.ranks.device. Needs CUDA and triton.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from baton.kvtransfer.blocks.device_copies import DeviceCopies
from baton.kvtransfer.blocks.device_pool import DevicePool, UnitMemory, mapped
from baton.kvtransfer.blocks.rank_copies import RankCopies
from baton.kvtransfer.blocks.rank_pools import RankPools
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.device import device_plane_by_layer, device_planes
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.reshard import Cut
from baton.models.adapters.slots import NO_SLOTS, AdapterSlots
from baton.models.cuda.adapter_bank import BankSlots
from baton.models.cuda.memory import GIB
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.rank_adapters import RankSlots
from baton.models.eagle_config import NO_STATIC_SCALES
from baton.models.fallback.config import model_config
from baton.models.partition import Rank, check_partition
from baton.node.addresses import ListenHost
from baton.node.errors import SettingsError
from baton.node.messages.base import Role
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.build_cpu import LoadedModel, checked_planes, model_part, pool_blocks, progress_log
from baton.worker.gpu_shares import gpus_of, is_sized, share_of_gpu
from baton.worker.kv_layout import name_of
from baton.worker.ranks.device import DeviceRank, bank_shape
from baton.worker.ranks.device_loading import DTYPES, device_layout
from baton.worker.ranks.following import LeadingRunner
from baton.worker.ranks.group import RankGroup, rank_start
from baton.worker.ranks.messages import (
    DeviceLoaded,
    DevicePoolsMade,
    RankReady,
    RankStart,
    SharedBytes,
)
from baton.worker.settings import WorkerSettings, WorkerSizes

logger = logging.getLogger("worker")

POLL_S = 0.0002
"""As a worker of one GPU."""


def load_ranks_on_cuda(
    settings: WorkerSettings, sizes: WorkerSizes, role: Role, folder: Path, draft: Path | None
) -> LoadedModel:
    """draft: the folder of an EAGLE-3 draft. Raises SettingsError for what no kernel here does, and where memory does
    not suffice."""
    config, count, gpus = model_config(folder), settings.tp, gpus_of(settings, f"--tp {settings.tp}")
    check_partition(config, count)
    if draft is not None and settings.kv_dtype == "fp8_static":
        raise SettingsError(NO_STATIC_SCALES)
    part = model_part(settings, folder, config.vocab_size, draft)
    how = settings.worker_id or role, settings.log_level, torch.get_num_threads()

    def start(index: int, fds: dict[int, int], memory: SharedBytes) -> RankStart:
        described = rank_start(part, count, *how, index, fds, memory)
        return msgspec.structs.replace(described, device=share_of_gpu(settings, sizes, gpus[index], settings.run_ahead))

    group = RankGroup(count, start)
    try:
        return _load(settings, sizes, role, group, start(0, {}, SharedBytes(0, 0, b"")), gpus)
    except torch.OutOfMemoryError as error:
        group.close()
        raise SettingsError(f"the memory of GPU {gpus[0]} does not suffice: {str(error).splitlines()[0]}") from None
    except BaseException:
        group.close()
        raise


def _load(
    settings: WorkerSettings, sizes: WorkerSizes, role: Role, group: RankGroup, start: RankStart, gpus: Sequence[int]
) -> LoadedModel:
    """Rank 0's part, and the pools of all."""
    names = checked_planes(sizes.plane, ("cuda_ipc", "nccl"))
    own = DeviceRank.load(start, progress_log("loading_weights", "tensors"))
    config, count = own.runner.config, settings.tp
    layout = device_layout(config, own.runner.kv_format, sizes.block_tokens, has_draft=bool(start.model.draft))
    others = group.answers(DeviceLoaded)
    if is_sized(settings, sizes):
        # The size is that of one rank's pool, as the memory is that of one GPU.
        num_blocks = pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, own.layout)
    else:
        num_blocks = min(own.num_blocks, *(other.num_blocks for other in others))
    pools = [DevicePool(own.layout, num_blocks, gpu) for gpu in gpus]
    torch.cuda.set_device(own.share.gpu)
    log_event(
        logger,
        "memory_planned",
        ranks=count,
        weights_gib=round(own.weights_bytes / GIB, 1),
        exchange_gib=round(own.exchange.payload_bytes / GIB, 2),
        kv_gib=round(num_blocks * own.layout.block_bytes / GIB, 1),
        blocks=num_blocks,
        tokens=num_blocks * layout.block_tokens,
    )
    max_model_len = min(own.longest, num_blocks * layout.block_tokens)
    exchanges = (own.exchange.handle, *(other.exchange for other in others))
    handles = tuple(pool.memory.handle for pool in pools)
    group.tell(DevicePoolsMade(pools=handles, exchanges=exchanges, num_blocks=num_blocks, max_model_len=max_model_len))
    began_at = time.monotonic()
    own.bind(pools[0].tensors, max_model_len, progress_log("capturing_graphs", "graphs"))
    own.connect(exchanges)
    group.answers(RankReady)
    group.give_up = own.peers.give_up
    log_event(logger, "steps_ready", took_s=round(time.monotonic() - began_at, 1))
    cut = Cut.even(layout.num_units, count, layout.num_layers)
    group_pool = RankPools(pools, cut)

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        made: list[Plane] = [
            ShardedPlane(cut, num_blocks, _ends(pools, context, identity, host, name, warm=role != "decode"))
            for name in names
        ]
        if role != "prefill" and "cuda_ipc" in names:  # for prefill workers with stages
            made.append(device_plane_by_layer(cut, pools, group_pool.layers_digest))
        torch.cuda.set_device(own.share.gpu)
        return made

    copies = None
    if settings.store:
        # A step that was read is complete on all GPUs: its draws, or meeting, come behind what ranks write.
        copies = RankCopies([DeviceCopies(pool.memory) for pool in pools], cut)
        torch.cuda.set_device(own.share.gpu)
    return LoadedModel(
        config,
        LeadingRunner(own.runner, group.peers(config.vocab_size).tell),
        group_pool,
        layout,
        name_of(DTYPES[settings.dtype]),
        max_model_len,
        make_planes,
        copies,
        POLL_S,
        adapter_slots=_slots(own, start, [other.bank for other in others], gpus),
        ranks=group,
    )


def _slots(own: DeviceRank, start: RankStart, banks: Sequence[bytes], gpus: Sequence[int]) -> AdapterSlots:
    """Of adapters, of all ranks; banks: handles of the memory of the others."""
    if own.bank is None:
        return NO_SLOTS
    slots = [own.runner.adapters]
    for index, handle in enumerate(banks, start=1):
        shape = bank_shape(own.runner.config, Rank(index, len(gpus)), start.model, DTYPES[start.model.dtype])
        assert shape is not None, "rank 0 has slots"
        memory = mapped(handle, shape.size_bytes, gpus[index])
        slots.append(BankSlots(shape, CudaQueue(gpus[index]), memory))
    torch.cuda.set_device(own.share.gpu)
    return RankSlots(own.runner.config, slots)


def _ends(
    pools: list[DevicePool], context: Context, identity: str, host: ListenHost, name: str, *, warm: bool
) -> list[Plane]:
    """Of each rank, over the units of its pool."""
    ends: list[Plane] = []
    for index, pool in enumerate(pools):
        memory = UnitMemory(pool.memory)
        ends += device_planes(memory, context, rank_name(identity, index), host, names=(name,), warm=warm)
    return ends
