"""A model over its pool of blocks on one device: what a worker is started from. Here the CPU's, and what all share.

A GPU's is in `build_cuda`, which needs triton and CUDA and is imported only where a GPU is used.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from baton.kvtransfer.blocks.copies import Copies, HostCopies
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import LayerMemory, SpreadPools, StagePools
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.protocol.transfer import POLL_S
from baton.kvtransfer.reshard import Cut
from baton.models.adapters.slots import NO_SLOTS, AdapterSlots
from baton.models.check import check_adapters, longest_known
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.fallback.config import model_config
from baton.models.partition import check_partition, check_stages
from baton.node.addresses import ListenHost
from baton.node.credentials import link_credentials
from baton.node.errors import SettingsError
from baton.node.messages.base import Role
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.host_planes import PLANES, plane_maker, planes_by_layer
from baton.worker.kv_layout import layout_of, name_of
from baton.worker.parts import NO_CHECKSUMS, Runner, StepChecksums
from baton.worker.ranks.group import RankGroup, start_ranks
from baton.worker.ranks.loading import load_part
from baton.worker.ranks.members import NO_RANKS, NoRanks, Ranks, pool_made
from baton.worker.ranks.messages import ModelPart
from baton.worker.settings import WorkerSettings, WorkerSizes
from baton.worker.stages.adapters import StagedSlots
from baton.worker.stages.group import StageGroup
from baton.worker.stages.remote.adapters import SpreadSlots
from baton.worker.stages.remote.copies import SpreadCopies
from baton.worker.stages.remote.first import RemoteStages
from baton.worker.stages.runner import PipelineRunner

logger = logging.getLogger("worker")

PROGRESS_EVERY_S = 2.0

MakePlanes = Callable[[Context, str, ListenHost], list[Plane]]
"""The data planes of a pool for an endpoint's context and identity, best first."""


class KvPool(Protocol):
    """The memory behind the block ids of a worker."""

    num_blocks: int

    def digests(self, chunks: Sequence[Sequence[int]]) -> list[bytes]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can run: its runner bound to a pool of blocks, and the ways by which blocks leave the pool."""

    config: ModelConfig
    runner: Runner
    pool: KvPool
    layout: KVLayout
    dtype: str
    """Of what is computed; that of what is stored is the layout's."""
    max_model_len: int
    make_planes: MakePlanes
    host_copies: Copies | None
    """How blocks get to and from the host's KV store; None where they cannot."""
    poll_s: float = POLL_S
    """How long to wait before looking again at a data plane."""
    checksums: StepChecksums = NO_CHECKSUMS
    """Checksums of what prefill computes, without waiting for what it computes next."""
    ranks: Ranks = NO_RANKS
    """The others of the worker."""
    adapter_slots: AdapterSlots = NO_SLOTS
    check_weights: Callable[[bytes], None] = lambda fingerprint: None
    """SettingsError if a process of the worker has read other weights than those of this fingerprint."""


def load_model(
    settings: WorkerSettings, sizes: WorkerSizes, device: str, role: Role, folder: Path, draft: Path | None = None
) -> LoadedModel:
    """draft: the folder of an EAGLE-3 draft. Raises SettingsError for what cannot run, or does not fit."""
    if settings.pp > 1 and role != "prefill":
        raise SettingsError(
            f"--pp {settings.pp}: a {role} worker has one stage: each token of an answer would wait for all stages in "
            "turn, so only prefill workers have more; --tp shares out a decode worker"
        )
    if settings.max_loras:
        check_adapters(model_config(folder))
    if device == "cpu":
        return _load_on_cpu(settings, sizes, role, folder, draft)
    if settings.pp > 1:
        from baton.worker.build_stages import load_stages_on_cuda

        return load_stages_on_cuda(settings, sizes, role, folder)
    if settings.tp > 1:
        from baton.worker.build_ranks import load_ranks_on_cuda

        return load_ranks_on_cuda(settings, sizes, role, folder, draft)
    from baton.worker.build_cuda import load_on_cuda

    return load_on_cuda(settings, sizes, role, folder, draft)


def choose_device(device: str) -> str:
    """ "cpu" or "cuda"; `auto` is a GPU where torch sees one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this torch sees no CUDA device")
    return device


def pool_blocks(num_blocks: int | None, kv_memory_gib: float, layout: KVLayout) -> int:
    """The size of the pool that the settings ask for."""
    if num_blocks is None:
        num_blocks = int(kv_memory_gib * (1 << 30)) // layout.block_bytes
    if num_blocks < 2:
        raise SettingsError(
            f"--kv-memory-gib {kv_memory_gib}: a block of {layout.block_tokens} tokens takes "
            f"{layout.block_bytes} bytes, so the pool would have {num_blocks} blocks"
        )
    return num_blocks


def checked_planes(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """`names`; SettingsError if one is not known for this device."""
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"--plane {unknown[0]}: there are {', '.join(known)}")
    return tuple(names)


def progress_log(event: str, thing: str) -> Callable[[int, int], None]:
    """Called with (done, total): logs a line every two seconds."""
    logged_at = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= PROGRESS_EVERY_S:
            logged_at = time.monotonic()
            log_event(logger, event, **{thing: done}, of=total)

    return on_progress


def _load_on_cpu(
    settings: WorkerSettings, sizes: WorkerSizes, role: Role, folder: Path, draft: Path | None
) -> LoadedModel:
    config = model_config(folder)
    check_partition(config, settings.tp)
    check_stages(config, settings.pp)
    processes = settings.tp * (1 if settings.stages_bind else settings.pp)
    if settings.threads is None and processes > 1:  # torch's choice is all cores for each process
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // processes)))
    part = model_part(settings, folder, config.vocab_size, draft)
    how = settings.worker_id or role, settings.log_level, torch.get_num_threads()
    stages: StageGroup | RemoteStages | None = None
    if settings.stages_bind:
        keys = link_credentials("stage", settings.secret_file, settings.insecure_network)
        stages = RemoteStages(part, settings.tp, how[0], keys, settings.stages_bind)
    elif settings.pp > 1:
        stages = StageGroup(part, settings.tp, *how)
    ranks: Ranks = NO_RANKS if stages is None else stages
    try:
        group, peers = start_ranks(part, settings.tp, *how)
        ranks = group if stages is None else stages.with_ranks(group)
        runner = load_part(part, peers, progress_log("loading_weights", "tensors"), settings.most_drafts)
        if isinstance(stages, RemoteStages):
            return _in_remote_stages(settings, sizes, runner, stages, group)
        if stages is not None:
            return _in_stages(settings, sizes, runner, stages, group)
        return _in_one_pool(settings, sizes, role, runner, group, draft is not None)
    except BaseException:
        ranks.close()
        raise


def model_part(settings: WorkerSettings, folder: Path, vocab_size: int, draft: Path | None = None) -> ModelPart:
    """What each process of the worker loads its part of; the first stage's."""
    return ModelPart(
        folder=str(folder),
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        load_format=settings.load_format,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        vocab_size=vocab_size,
        num_stages=settings.pp,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        lora_room=settings.lora_room,
        draft="" if draft is None else str(draft),
    )


def _in_one_pool(
    settings: WorkerSettings,
    sizes: WorkerSizes,
    role: Role,
    runner: ModelRunner,
    ranks: RankGroup | NoRanks,
    has_draft: bool,
) -> LoadedModel:
    """The model over the pool of all ranks."""
    layout = layout_of(runner.config, runner.kv_format, sizes.block_tokens, has_draft=has_draft)
    pool = BlockPool(layout, pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, layout))
    runner.bind_pool(pool.tensor, pool.scales)
    if not isinstance(ranks, NoRanks):
        ranks.share_pool(pool_made(pool))
    names = checked_planes(sizes.plane, PLANES)

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        make = plane_maker(context, host)
        planes = [make(name, pool, identity) for name in names if name != "shm" or pool.shared is not None]
        if role == "prefill":
            return planes
        # A worker with stages has pools of its stages' layers, and so has no plane of whole blocks.
        cut = Cut.even(pool.num_units, 1, layout.num_layers)
        return planes + planes_by_layer(cut, [pool], pool.layers_digest, names, make, identity)

    return _loaded(settings, runner, runner, pool, layout, make_planes, HostCopies(pool), ranks)


def _in_stages(
    settings: WorkerSettings,
    sizes: WorkerSizes,
    first: ModelRunner,
    stages: StageGroup,
    ranks: RankGroup | NoRanks,
) -> LoadedModel:
    """The model over a pool for each stage, all in the memory of this process."""
    layout = layout_of(first.config, first.kv_format, sizes.block_tokens)
    cut = Cut.even(layout.num_units, 1, layout.num_layers, settings.pp)
    pools = StagePools(cut, layout, pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, layout))
    own, *others = pools.pools
    first.bind_pool(own.tensor, own.scales)
    ranks.share_pool(pool_made(own))
    stages.share_pools(others)
    names = checked_planes(sizes.plane, PLANES)

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        make = plane_maker(context, host)
        return planes_by_layer(cut, pools.pools, pools.layers_digest, names, make, identity)

    runner = PipelineRunner(first, settings.pp, stages.following, stages.last)
    loaded = _loaded(settings, first, runner, pools, layout, make_planes, HostCopies(pools), stages)
    return replace(loaded, adapter_slots=StagedSlots(first.adapters, stages.following))


def _in_remote_stages(
    settings: WorkerSettings,
    sizes: WorkerSizes,
    first: ModelRunner,
    stages: RemoteStages,
    ranks: RankGroup | NoRanks,
) -> LoadedModel:
    """The model over a pool for each stage, each in its own host's memory."""
    layout = layout_of(first.config, first.kv_format, sizes.block_tokens)
    cut = Cut.even(layout.num_units, 1, layout.num_layers, settings.pp)
    if "zmq" not in checked_planes(sizes.plane, PLANES):
        raise SettingsError(f"--plane {' '.join(sizes.plane)}: stages on other hosts send their KV over zmq")
    pools = SpreadPools(cut, layout, pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, layout))
    first.bind_pool(pools.own.tensor, pools.own.scales)
    ranks.share_pool(pool_made(pools.own))
    stages.wait_loaded()
    stages.give_sums(pools.take_sums)
    copies = SpreadCopies(pools, stages)
    stages.give_answers(copies.take)

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        own = plane_maker(context, host)("zmq", LayerMemory(pools.own), rank_name(identity, 0))
        names = [rank_name(identity, stage) for stage in range(1, settings.pp)]
        rows = [pools.num_blocks * layout.num_units * len(layers) for layers in cut.layers[1:]]
        ends = stages.make_ends(pools.num_blocks, layout.block_tokens, names, rows)
        return [ShardedPlane(cut, pools.num_blocks, [own, *ends], pools.layers_digest)]

    runner = PipelineRunner(first, settings.pp, stages.following, stages.last)
    loaded = _loaded(settings, first, runner, pools, layout, make_planes, copies, stages)
    slots = SpreadSlots(first.adapters, settings.pp, stages, stages.following)
    return replace(loaded, check_weights=stages.check_weights, adapter_slots=slots)


def _loaded(
    settings: WorkerSettings,
    loaded: ModelRunner,
    runner: Runner,
    pool: KvPool,
    layout: KVLayout,
    make_planes: MakePlanes,
    copies: Copies,
    ranks: Ranks,
) -> LoadedModel:
    longest = longest_known(settings.max_model_len, loaded.config)
    max_model_len = min(longest, pool.num_blocks * layout.block_tokens)
    dtype = name_of(loaded.dtype)
    return LoadedModel(
        loaded.config,
        runner,
        pool,
        layout,
        dtype,
        max_model_len,
        make_planes,
        copies,
        ranks=ranks,
        adapter_slots=loaded.adapters,
    )
