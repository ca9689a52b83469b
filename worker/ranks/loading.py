"""A process's part of the model, loaded and bound to a pool in shared memory that another process may have made."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.kvtransfer.blocks.memory import SharedFile, SharedReader
from baton.kvtransfer.blocks.views import kv_tensors
from baton.models.cpu.peers import RankPeers
from baton.models.cpu.runner import ModelRunner
from baton.models.partition import Stage
from baton.models.weights import Progress, no_progress
from baton.worker.kv_layout import layout_of
from baton.worker.ranks.messages import ModelPart, PoolMade, SharedBytes


def load_part(
    part: ModelPart,
    peers: RankPeers,
    on_progress: Progress = no_progress,
    most_drafts: int = 0,
) -> ModelRunner:
    """SettingsError for what cannot be run. most_drafts: see ModelRunner.load; of rank 0."""
    return ModelRunner.load(
        Path(part.folder),
        dtype=part.dtype,
        kv_dtype=part.kv_dtype,
        load_format=part.load_format,
        quantization=part.quantization,
        max_model_len=part.max_model_len,
        on_progress=on_progress,
        peers=peers,
        stage=stage_of(part),
        eagle=Path(part.draft) if part.draft else None,
        most_drafts=most_drafts,
        max_loras=part.max_loras,
        max_lora_rank=part.max_lora_rank,
    )


def stage_of(part: ModelPart) -> Stage:
    """The layers that the process computes."""
    return Stage(part.stage, part.num_stages)


def bind_pool(runner: ModelRunner, part: ModelPart, made: PoolMade) -> None:
    """Map the pool and use it."""
    flat = torch.frombuffer(mapped(made.pid, made.memory).view, dtype=torch.uint8)
    layout = layout_of(runner.config, runner.kv_format, made.block_tokens, stage_of(part), has_draft=bool(part.draft))
    runner.bind_pool(*kv_tensors(flat[: made.num_blocks * layout.block_bytes], layout, made.num_blocks))


def mapped(pid: int, memory: SharedBytes) -> SharedReader:
    """Memory of the process `pid`, to read and write. Raises PeerLost where it is not that memory any more."""
    return SharedReader(pid, SharedFile(memory.fd, memory.size_bytes, memory.nonce), writable=True)
