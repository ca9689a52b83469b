"""Which GPUs the processes of a worker compute on, and what each may use of its own. Needs a torch with CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.node.errors import SettingsError
from baton.worker.ranks.messages import DeviceShare
from baton.worker.settings import WorkerSettings, WorkerSizes


def gpus_of(settings: WorkerSettings, option: str) -> Sequence[int]:
    """Of the ranks, or the stages, in order; option: says how many there are. SettingsError for GPUs that are not
    there."""
    count = settings.tp * settings.pp
    gpus = settings.rank_gpus or range(settings.gpu, settings.gpu + count)
    if len(gpus) != count:
        raise SettingsError(f"--rank-gpus names {len(gpus)} GPUs for {option}")
    if max(gpus) >= torch.cuda.device_count():
        raise SettingsError(
            f"{option}: needs the GPUs {' '.join(map(str, gpus))}, and this torch sees "
            f"{torch.cuda.device_count()}, counted from 0"
        )
    return gpus


def share_of_gpu(settings: WorkerSettings, sizes: WorkerSizes, gpu: int, run_ahead: int) -> DeviceShare:
    """run_ahead: steps that are launched there before the first of them is read."""
    return DeviceShare(
        gpu=gpu,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        run_ahead=run_ahead,
        deterministic=settings.deterministic,
        most_drafts=settings.most_drafts,
        block_tokens=sizes.block_tokens,
        gpu_memory_utilization=None if is_sized(settings, sizes) else settings.gpu_memory_utilization,
    )


def is_sized(settings: WorkerSettings, sizes: WorkerSizes) -> bool:
    """Whether the size of the pools is given."""
    return settings.num_blocks is not None or sizes.kv_memory_gib is not None
