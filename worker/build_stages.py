"""A model on several GPUs, one a stage of a prefill worker: the first stage's process has the pools of all, the planes
over their layers, and launches all steps.

What a stage does on its GPU is in worker.stages.device. Needs CUDA and triton.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import torch

from baton.kvtransfer.blocks.device_stage_pools import DeviceStagePools, stage_layouts
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.device import device_plane_by_layer
from baton.models.cuda.memory import GIB
from baton.models.cuda.residuals import ResidualSlots
from baton.models.cuda.stage import AdvancingStage
from baton.models.fallback.config import model_config
from baton.models.partition import check_stages
from baton.node.addresses import ListenHost
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.messages.base import Role
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.build_cpu import LoadedModel, checked_planes, model_part, pool_blocks, progress_log
from baton.worker.gpu_shares import gpus_of, is_sized, share_of_gpu
from baton.worker.kv_layout import name_of
from baton.worker.ranks.device_loading import DTYPES, limits_of, padding_of
from baton.worker.ranks.members import shared_bytes
from baton.worker.ranks.messages import DeviceShare, DeviceStageLoaded, DeviceStagePool, ModelPart, RankReady
from baton.worker.settings import WorkerSettings, WorkerSizes
from baton.worker.stages.device import DeviceStage
from baton.worker.stages.group import StageGroup
from baton.worker.stages.late import LatePipelineRunner

logger = logging.getLogger("worker")

POLL_S = 0.0002
"""As a worker of one GPU."""


def load_stages_on_cuda(settings: WorkerSettings, sizes: WorkerSizes, role: Role, folder: Path) -> LoadedModel:
    """Raises SettingsError for what no kernel here does, and where memory does not suffice."""
    config, count = model_config(folder), settings.pp
    _check(settings, sizes)
    check_stages(config, count)
    gpus = gpus_of(settings, f"--pp {count}")
    part = model_part(settings, folder, config.vocab_size)

    shares = [share_of_gpu(settings, sizes, gpu, count - 1 + settings.run_ahead) for gpu in gpus]
    slots = ResidualSlots.of(limits_of(shares[0], part), config.hidden_size, DTYPES[part.dtype])
    with ExitStack() as stack:  # all have mapped it behind this
        between = [stack.enter_context(closing(HostMemory(1, slots.size_bytes))) for _ in range(1, count)]
        memories = [None, *(shared_bytes(memory.shared) for memory in between), None]
        shares = [
            msgspec.structs.replace(share, entering=entering, leaving=leaving)
            for share, entering, leaving in zip(shares, memories, memories[1:], strict=False)
        ]
        return _load(settings, sizes, role, part, shares)


def _load(
    settings: WorkerSettings, sizes: WorkerSizes, role: Role, part: ModelPart, shares: Sequence[DeviceShare]
) -> LoadedModel:
    """shares: of the stages."""
    how, gpus = (settings.worker_id or role, settings.log_level, torch.get_num_threads()), [each.gpu for each in shares]
    stages = StageGroup(part, 1, *how, shares.__getitem__)
    try:
        first = DeviceStage.load(part, shares[0], os.getpid(), progress_log("loading_weights", "tensors"))
        return _over_pools(settings, sizes, stages, first, gpus)
    except torch.OutOfMemoryError as error:
        stages.close()
        raise SettingsError(f"the memory of GPU {gpus[0]} does not suffice: {str(error).splitlines()[0]}") from None
    except BaseException:
        stages.close()
        raise


def _check(settings: WorkerSettings, sizes: WorkerSizes) -> None:
    """SettingsError for what stages on GPUs do not do."""
    stages = f"--pp {settings.pp} on GPUs"
    if settings.tp > 1:
        raise SettingsError(f"--tp {settings.tp} with {stages}: a stage has one GPU; --tp 1 or --pp 1")
    if settings.stages_bind:
        raise SettingsError(f"--stages-bind with {stages}: the stages are processes of one host")
    if settings.max_loras:
        raise SettingsError(f"--max-loras with {stages}: no stage computes with adapters; --device cpu or --pp 1")
    if "cuda_ipc" not in checked_planes(sizes.plane, ("cuda_ipc", "nccl")):
        raise SettingsError(f"--plane {' '.join(sizes.plane)} with {stages}: they send over cuda_ipc")


def _over_pools(
    settings: WorkerSettings, sizes: WorkerSizes, stages: StageGroup, first: DeviceStage, gpus: Sequence[int]
) -> LoadedModel:
    """The model over a pool for each stage, each on its GPU."""
    layout, cut = first.whole_layout, first.cut
    others = stages.answers(DeviceStageLoaded)
    if is_sized(settings, sizes):
        # The size is that of the largest pool, as the memory is that of one GPU.
        layouts = stage_layouts(cut, layout, padding_of)
        num_blocks = min(pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, each) for each in layouts)
    else:
        num_blocks = min(first.num_blocks, *(other.num_blocks for other in others))
    pools = DeviceStagePools(cut, layout, num_blocks, gpus, padding_of)
    torch.cuda.set_device(first.share.gpu)
    log_event(
        logger,
        "memory_planned",
        stages=len(gpus),
        weights_gib=round(first.weights_bytes / GIB, 1),
        kv_gib=round(num_blocks * pools.pools[0].block_bytes / GIB, 1),
        blocks=num_blocks,
        tokens=num_blocks * layout.block_tokens,
    )
    max_model_len = min(first.longest, num_blocks * layout.block_tokens)
    own, *later = pools.pools
    stages.tell(
        [DeviceStagePool(pool=pool.memory.handle, num_blocks=num_blocks, max_model_len=max_model_len) for pool in later]
    )
    began_at = time.monotonic()
    first.bind(own.tensors, max_model_len)
    stages.answers(RankReady)
    log_event(logger, "steps_ready", took_s=round(time.monotonic() - began_at, 1))

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        made = device_plane_by_layer(cut, pools.pools, pools.layers_digest)
        torch.cuda.set_device(first.share.gpu)
        return [made]

    copies = None
    if settings.store:
        # A step that was read is complete on all GPUs: the last stage ends it.
        copies = pools.copies()
        torch.cuda.set_device(first.share.gpu)
    if not isinstance(first.runner, AdvancingStage):
        raise InvariantBroken("the first of several stages is not the last")
    return LoadedModel(
        first.config,
        LatePipelineRunner(first.runner, stages.following, stages.last, first.use_gpu),
        pools,
        layout,
        name_of(DTYPES[settings.dtype]),
        max_model_len,
        make_planes,
        copies,
        POLL_S,
        ranks=stages,
    )
