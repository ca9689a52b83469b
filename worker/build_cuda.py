"""A model on one GPU with its pool of blocks: loads it, plans the memory, captures its steps. Needs CUDA and triton."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from baton.kvtransfer.blocks.device_copies import DeviceCopies
from baton.kvtransfer.blocks.device_pool import DevicePool, UnitMemory
from baton.kvtransfer.blocks.digest import SumsBehind
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.device import device_plane_by_layer, device_planes
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.reshard import Cut
from baton.models.check import longest_known, recipe_for
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits, room_limits
from baton.models.cuda.memory import GIB, GRAPHS_BYTES, GpuMemory, plan_blocks, unit_padding
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import NO_STATIC_SCALES, read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.fallback.config import model_config
from baton.models.kv_scales import kv_format_of
from baton.models.weights import load_weights
from baton.node.addresses import ListenHost
from baton.node.errors import SettingsError
from baton.node.messages.base import Role
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.build_cpu import (
    LoadedModel,
    checked_planes,
    pool_blocks,
    progress_log,
)
from baton.worker.kv_layout import layout_of, name_of
from baton.worker.parts import NO_CHECKSUMS, StepChecksums
from baton.worker.settings import WorkerSettings, WorkerSizes

logger = logging.getLogger("worker")

POLL_S = 0.0002
"""A fifth of what the KV of a prompt of 2048 tokens of an 8B model takes to move."""
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_on_cuda(
    settings: WorkerSettings, sizes: WorkerSizes, role: Role, folder: Path, draft: Path | None = None
) -> LoadedModel:
    """Raises SettingsError for what no kernel here does, and where memory does not suffice."""
    names = checked_planes(sizes.plane, ("cuda_ipc", "nccl"))
    index = settings.gpu
    if index >= torch.cuda.device_count():
        raise SettingsError(f"--gpu {index}: this torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    torch.cuda.set_device(index)
    config = model_config(folder)
    longest = longest_known(settings.max_model_len, config)
    config = config.up_to(longest)
    try:
        load = _load_fallback if config.through else _load
        runner, weights_bytes = load(settings, sizes, folder, config, longest, draft)
        config = runner.config
        layout = layout_of(config, runner.kv_format, sizes.block_tokens, has_draft=draft is not None)
        padding = unit_padding(layout.num_layers, layout.layer_bytes, layout.data_bytes)
        layout = replace(layout, padding_bytes=padding)
        pool = DevicePool(layout, _pool_blocks(settings, sizes, layout, weights_bytes), index)
        max_model_len = min(longest, pool.num_blocks * layout.block_tokens)
        began_at, (free_bytes, _) = time.monotonic(), torch.cuda.mem_get_info(index)
        runner.bind_pool(pool.tensor, max_model_len, progress_log("capturing_graphs", "graphs"), pool.scales)
        runner.warm_up()
        graphs_gib = _gib(free_bytes - torch.cuda.mem_get_info(index)[0])
        log_event(logger, "steps_ready", took_s=round(time.monotonic() - began_at, 1), graphs_gib=graphs_gib)
    except torch.OutOfMemoryError as error:
        raise SettingsError(f"the GPU's memory does not suffice: {str(error).splitlines()[0]}") from None

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        made = device_planes(pool.memory, context, identity, host, names=names, warm=role != "decode")
        if "cuda_ipc" in names:  # for workers of several ranks
            ends = device_planes(UnitMemory(pool.memory), context, rank_name(identity, 0), host, names=("cuda_ipc",))
            cut = Cut.even(layout.num_units, 1, layout.num_layers)
            made.append(ShardedPlane(cut, pool.num_blocks, ends))
            if role != "prefill":  # for prefill workers with stages
                made.append(device_plane_by_layer(cut, [pool], pool.layers_digest))
        return made

    # The loops offer the store only blocks of steps that were read, so they are complete on the GPU.
    copies = DeviceCopies(pool.memory) if settings.store else None
    return LoadedModel(
        config,
        runner,
        pool,
        layout,
        name_of(DTYPES[settings.dtype]),
        max_model_len,
        make_planes,
        copies,
        POLL_S,
        _checksums(sizes, role, runner, pool),
        adapter_slots=runner.adapters,
    )


def _load(
    settings: WorkerSettings, sizes: WorkerSizes, folder: Path, config: ModelConfig, longest: int, draft: Path | None
) -> tuple[CudaRunner, int]:
    """And the bytes of its weights, and of its draft's."""
    began_at = time.monotonic()
    eagle_config = None if draft is None else read_eagle(draft, config)
    if draft is not None and settings.kv_dtype == "fp8_static":
        raise SettingsError(NO_STATIC_SCALES)
    weights = load_weights(
        config,
        folder,
        DTYPES[settings.dtype],
        f"cuda:{settings.gpu}",
        settings.load_format,
        progress_log("loading_weights", "tensors"),
        pack=False,
        recipe=recipe_for(settings.quantization, config),
        keep_quantised=True,
    )
    torch.cuda.empty_cache()  # what tensors took on their way is not the model's, as the plan of the pool counts it
    sizes_bytes = weights.size_bytes
    log_event(
        logger,
        "weights_loaded",
        took_s=round(time.monotonic() - began_at, 1),
        weights_gib=_gib(sum(sizes_bytes.values())),
        formats=",".join(f"{name}:{_gib(size)}" for name, size in sorted(sizes_bytes.items())),
    )
    limits = StepLimits(
        sizes.max_num_seqs,
        sizes.max_num_batched_tokens,
        settings.run_ahead,
        settings.deterministic,
        most_drafts=settings.most_drafts,
        adapter_slots=settings.max_loras,
        max_rank=settings.max_lora_rank,
        **room_limits(settings.lora_room),
    )
    kv_format = kv_format_of(settings.kv_dtype, config, folder, weights.embedding.dtype, settings.load_format)
    eagle, draft_bytes = None, 0
    if draft is not None and eagle_config is not None:
        draft_weights = load_eagle(eagle_config, draft, weights, settings.load_format, pack=False)
        torch.cuda.empty_cache()
        eagle, draft_bytes = (eagle_config, draft_weights), draft_weights.size_bytes
        log_event(logger, "draft_loaded", draft=draft.name, weights_gib=round(draft_bytes / GIB, 3))
    runner = CudaRunner(config, weights, CudaQueue(settings.gpu), limits, longest, kv_format=kv_format, eagle=eagle)
    return runner, sum(sizes_bytes.values()) + draft_bytes


def _load_fallback(
    settings: WorkerSettings, sizes: WorkerSizes, folder: Path, config: ModelConfig, longest: int, draft: Path | None
) -> tuple[CudaRunner, int]:
    """As `_load`, of a model that runs through transformers."""
    if settings.deterministic:
        raise SettingsError(f"--deterministic: {config.architecture} runs through transformers, whose sums vary")
    if settings.most_drafts:
        raise SettingsError(f"--speculate: {config.architecture} runs through transformers, which verifies no drafts")
    if draft is not None:
        read_eagle(draft, config)  # which says why not
    recipe_for(settings.quantization, config)
    # The library is large, and optional: it is imported where a model needs it.
    from baton.models.fallback.device_loader import load_on_device

    began_at, dtype, queue = time.monotonic(), DTYPES[settings.dtype], CudaQueue(settings.gpu)
    limits = StepLimits(sizes.max_num_seqs, sizes.max_num_batched_tokens, settings.run_ahead)
    most_tokens = max(limits.max_tokens, limits.max_rows)
    config, decoder = load_on_device(config, folder, dtype, settings.load_format, queue, most_tokens, limits.max_rows)
    log_event(
        logger,
        "weights_loaded",
        took_s=round(time.monotonic() - began_at, 1),
        weights_gib=_gib(decoder.size_bytes),
        formats=f"dense:{_gib(decoder.size_bytes)}",
    )
    kv_format = kv_format_of(settings.kv_dtype, config, folder, dtype, settings.load_format)
    return CudaRunner(config, decoder, queue, limits, longest, kv_format=kv_format), decoder.size_bytes


def _checksums(sizes: WorkerSizes, role: Role, runner: CudaRunner, pool: DevicePool) -> StepChecksums:
    """For a worker that offers what it computes: room for all blocks of the steps in flight."""
    if role == "decode":
        return NO_CHECKSUMS
    most = sizes.max_num_batched_tokens // pool.layout.block_tokens + 2 * sizes.max_num_seqs  # parts at both ends
    queue = runner.queue
    return SumsBehind(pool.memory.data, most, runner.run_ahead + 1, queue.enqueue, queue.mark)


def _pool_blocks(settings: WorkerSettings, sizes: WorkerSizes, layout: KVLayout, weights_bytes: int) -> int:
    """The size that the settings ask for, or what the worker's share of the GPU leaves; logs what takes how much."""
    index = settings.gpu
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    own_bytes = torch.cuda.memory_reserved(index)
    if settings.num_blocks is not None or sizes.kv_memory_gib is not None:
        num_blocks = pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, layout)
    else:
        memory = GpuMemory(total_bytes, free_bytes, own_bytes)
        num_blocks = plan_blocks(memory, settings.gpu_memory_utilization, layout.block_bytes)
    log_event(
        logger,
        "memory_planned",
        gpu_gib=_gib(total_bytes),
        free_gib=_gib(free_bytes),
        weights_gib=_gib(weights_bytes),
        activations_gib=_gib(own_bytes - weights_bytes),
        graphs_gib=_gib(GRAPHS_BYTES),
        kv_gib=_gib(num_blocks * layout.block_bytes),
        blocks=num_blocks,
        tokens=num_blocks * layout.block_tokens,
    )
    return num_blocks


def _gib(size_bytes: int) -> float:
    return round(size_bytes / GIB, 1)
