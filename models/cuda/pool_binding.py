"""What a runner on a GPU makes for the pool that it is bound to: the kinds of its steps, over tables of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.kernels.triton.pool import PagedPool
from baton.models.config import ModelConfig
from baton.models.cuda.chunk_forward import ChunkForward
from baton.models.cuda.chunk_steps import ChunkSteps
from baton.models.cuda.decode_steps import DecodeSteps
from baton.models.cuda.draft_graphs import DraftGraphs
from baton.models.cuda.mixed_steps import MixedSteps
from baton.models.cuda.prefill_pieces import PrefillPieces
from baton.models.kv_format import KvFormat
from baton.models.weights import Progress
from baton.node.errors import InvariantBroken, SettingsError


@dataclass(frozen=True, slots=True)
class PoolBinding:
    """Depends on how many blocks a sequence may have, and how large the pool's blocks are."""

    block_tokens: int
    decode: DecodeSteps
    forward: ChunkForward
    chunks: ChunkSteps
    mixed: MixedSteps
    pieces: PrefillPieces
    after: DraftGraphs | None
    """What follows the draws of decode steps, where there are drafts."""
    decodes: bool
    """False: all steps are of prompts."""

    def capture_all(self, on_progress: Progress) -> None:
        """In place of what was captured before; on_progress counts decode steps."""
        if self.decodes:
            self.decode.capture_all(on_progress)
        if self.after is not None:
            self.after.capture_all()
        self.forward.capture_all()
        self.pieces.capture_all()


def paged_pool(
    pool: torch.Tensor, scales: torch.Tensor | None, shape: ModelConfig, num_layers: int, kv_format: KvFormat
) -> PagedPool:
    """As kernels take it, with all scales; InvariantBroken if it is not as the model needs it.

    shape, kv_format: of the part of the model that has this pool; num_layers: of the pool.
    """
    block_tokens = pool.shape[4]
    if block_tokens & (block_tokens - 1):
        raise SettingsError(f"--block-tokens {block_tokens}: on a GPU it must be a power of two")
    expected = (pool.shape[0], shape.num_kv_heads, num_layers, shape.kv_planes, block_tokens, shape.head_dim)
    if tuple(pool.shape) != expected or pool.dtype != kv_format.dtype:
        raise InvariantBroken(f"a pool of {pool.dtype} {list(pool.shape)}, expected {kv_format.dtype} {list(expected)}")
    if (scales is not None) != kv_format.has_scales_inside:
        raise InvariantBroken("a pool has scales if, and only if, they are made when KV is written")
    static = kv_format.static
    return PagedPool.of(pool, scales if static is None else static.to(pool.device), shape.kv_planes)
