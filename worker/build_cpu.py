"""A model over its pool of blocks on one device: what a worker is started from. Here the CPU's, and what all share.

A GPU's is in `build_cuda`, which needs triton and CUDA and is imported only where a GPU is used.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from baton.kvtransfer.blocks.copies import Copies, HostCopies
from baton.kvtransfer.blocks.layout import KVLayout, Scales
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.kvtransfer.protocol.transfer import POLL_S
from baton.models.check import longest_known
from baton.models.config import ModelConfig
from baton.models.cpu.peers import NO_PEERS, RankPeers
from baton.models.cpu.runner import ModelRunner
from baton.models.fallback.config import model_config
from baton.models.kv_format import KvFormat
from baton.models.partition import check_partition
from baton.node.addresses import ListenHost
from baton.node.errors import SettingsError
from baton.node.messages.base import Role
from baton.node.sockets import Context
from baton.node.telemetry import log_event
from baton.worker.parts import NO_CHECKSUMS, Runner, StepChecksums
from baton.worker.ranks.group import NO_RANKS, RankGroup, Ranks
from baton.worker.ranks.messages import RankStart, SharedBytes
from baton.worker.settings import WorkerSettings, WorkerSizes

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


def load_model(
    settings: WorkerSettings, sizes: WorkerSizes, device: str, role: Role, folder: Path, draft: Path | None = None
) -> LoadedModel:
    """draft: the folder of an EAGLE-3 draft. Raises SettingsError for what cannot run, or does not fit."""
    if device == "cpu":
        return _load_on_cpu(settings, sizes, folder, draft)
    if settings.tp > 1:
        from baton.worker.build_ranks import load_ranks_on_cuda

        return load_ranks_on_cuda(settings, sizes, role, folder)
    from baton.worker.build_cuda import load_on_cuda

    return load_on_cuda(settings, sizes, role, folder, draft)


def choose_device(device: str) -> str:
    """ "cpu" or "cuda"; `auto` is a GPU where torch sees one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this torch sees no CUDA device")
    return device


def layout_of(config: ModelConfig, kv_format: KvFormat, block_tokens: int, *, has_draft: bool = False) -> KVLayout:
    """has_draft: the KV of a draft is one more layer."""
    scales: Scales = "none"
    if kv_format.quantised:
        scales = "token" if kv_format.has_scales_inside else "static"
    return KVLayout.of_model(
        num_layers=config.num_layers + has_draft,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=name_of(kv_format.dtype),
        scales=scales,
        scales_digest=kv_format.scales_digest(),
        planes=config.kv_planes,
    )


def name_of(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


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


def _load_on_cpu(settings: WorkerSettings, sizes: WorkerSizes, folder: Path, draft: Path | None) -> LoadedModel:
    if settings.tp == 1:
        return _load_rank(settings, sizes, folder, NO_PEERS, NO_RANKS, draft)
    config = model_config(folder)
    check_partition(config, settings.tp)
    if settings.threads is None:  # torch's choice is all cores for each process
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // settings.tp)))
    group = RankGroup(settings.tp, partial(rank_start, settings, folder, config.vocab_size))
    try:
        return _load_rank(settings, sizes, folder, group.peers(config.vocab_size), group)
    except BaseException:
        group.close()
        raise


def rank_start(
    settings: WorkerSettings, folder: Path, vocab_size: int, index: int, fds: dict[int, int], memory: SharedBytes
) -> RankStart:
    """Describes a rank from 1 on, which loads its part while this process loads that of rank 0."""
    return RankStart(
        index=index,
        count=settings.tp,
        starter_pid=os.getpid(),
        name=f"{settings.worker_id or 'worker'}/{index}",
        log_level=settings.log_level,
        peer_fds=fds,
        memory=memory,
        vocab_size=vocab_size,
        folder=str(folder),
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        load_format=settings.load_format,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        threads=torch.get_num_threads(),
    )


def _load_rank(
    settings: WorkerSettings,
    sizes: WorkerSizes,
    folder: Path,
    peers: RankPeers,
    ranks: Ranks,
    draft: Path | None = None,
) -> LoadedModel:
    """Rank 0's part of the model over the pool of all ranks."""
    runner = ModelRunner.load(
        folder,
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        load_format=settings.load_format,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        on_progress=progress_log("loading_weights", "tensors"),
        peers=peers,
        eagle=draft,
        most_drafts=settings.most_drafts,
    )
    layout = layout_of(runner.config, runner.kv_format, sizes.block_tokens, has_draft=draft is not None)
    longest = longest_known(settings.max_model_len, runner.config)
    names = checked_planes(sizes.plane, ("shm", "zmq"))
    pool = BlockPool(layout, pool_blocks(settings.num_blocks, sizes.kv_memory_gib or 0.0, layout))
    runner.bind_pool(pool.tensor, pool.scales)
    ranks.share_pool(pool)

    def make_planes(context: Context, identity: str, host: ListenHost) -> list[Plane]:
        makers: dict[str, Callable[[], Plane]] = {
            "shm": lambda: ShmPlane(pool),
            "zmq": lambda: ZmqPlane(context, pool, identity, host),
        }
        return [makers[name]() for name in names if name != "shm" or pool.shared is not None]

    max_model_len = min(longest, pool.num_blocks * layout.block_tokens)
    dtype = name_of(runner.dtype)
    return LoadedModel(
        runner.config, runner, pool, layout, dtype, max_model_len, make_planes, HostCopies(pool), ranks=ranks
    )
