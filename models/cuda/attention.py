"""Which kernel attends for parts of prompts: Hopper's, where it can, else the portable one. Chosen once for a pool."""

from __future__ import annotations

from typing import Protocol

import torch

from baton.kernels.triton import prefill_attention
from baton.kernels.triton.pool import PagedPool
from baton.models.config import ModelConfig
from baton.models.cuda.decoder import Attend
from baton.models.cuda.queue import Queue
from baton.models.layers import describe

ITEMS_A_MULTIPROCESSOR = 2
"""Up to so many items of the work list a program each is faster than programs that take items from a counter."""


class ChunkAttention(Protocol):
    """Attention of ragged chunks of sequences over their cached tokens and themselves."""

    tile: int
    """Tokens of one item of the work list."""

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        """For one step; the arrays as kernels.triton.prefill_attention takes them."""
        ...


def choose_attention(config: ModelConfig, pool: PagedPool, queue: Queue, deterministic: bool) -> ChunkAttention:
    """The portable kernel's bits do not depend on how a prompt is cut into chunks; the other's do."""
    plain = (
        config.sliding_window is None and config.score_softcap is None and config.score_scale == config.head_dim**-0.5
    )
    if pool.tensor.is_cuda and plain and pool.scales is None and not deterministic:
        # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
        from baton.kernels.triton import prefill_gluon

        if prefill_gluon.is_available(torch.cuda.get_device_capability(pool.tensor.device)) and prefill_gluon.reads(
            pool
        ):
            return _Hopper(pool, queue.num_sms)
    return _Portable(config, pool)


class _Portable:
    def __init__(self, config: ModelConfig, pool: PagedPool) -> None:
        self.tile = prefill_attention.block_m(config.head_dim)
        self._shapes, self._pool = [shape.attention for shape in describe(config)], pool

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        shapes, pool, tile = self._shapes, self._pool, self.tile

        def attend(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            shape = shapes[layer]
            prefill_attention.prefill_attention(
                query,
                pool,
                layer,
                tables,
                starts,
                lengths,
                work,
                tile,
                out,
                window=shape.window,
                scale=shape.scores.scale,
            )

        return attend


class _Hopper:
    def __init__(self, pool: PagedPool, num_sms: int) -> None:
        from baton.kernels.triton import prefill_gluon

        self.tile = prefill_gluon.BLOCK_M
        self._attention = prefill_gluon.prefill_attention
        self._pool, self._num_sms = pool, num_sms
        self._counter = torch.zeros(2, dtype=torch.int32, device=pool.rows.device)

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        counter = self._counter if len(work) > ITEMS_A_MULTIPROCESSOR * self._num_sms else None

        def attend(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            self._attention(query, self._pool, layer, tables, starts, lengths, work, self._num_sms, counter, out)

        return attend
