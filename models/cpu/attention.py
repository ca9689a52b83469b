"""A layer's attention over a step: writes keys and values into the paged pool, then serves decode groups and chunks.

Knows the pool's shape, not which sequence owns a block.
"""

from __future__ import annotations

import torch

from baton import kernels
from baton.models.config import ModelConfig
from baton.models.cpu.step_batch import PoolShape, StepBatch
from baton.models.layers import describe
from baton.models.partition import WHOLE, Rank


class PagedAttention:
    """A rank's attention of one model over one pool, with blocks of so many tokens and all key heads."""

    def __init__(
        self, config: ModelConfig, kv: kernels.PagedKv, block_tokens: int, element_bytes: int, rank: Rank = WHOLE
    ) -> None:
        """element_bytes: of the numbers that are gathered."""
        self._kv = kv
        units = rank.key_heads(config.num_kv_heads)
        self.shape = PoolShape(
            num_units=config.num_kv_heads,
            units=units,
            num_layers=config.num_layers,
            block_tokens=block_tokens,
            token_bytes=2 * len(units) * config.head_dim * element_bytes,
        )
        self._shapes = [shape.attention for shape in describe(config, rank)]

    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor, step: StepBatch) -> torch.Tensor:
        """[N, num_heads * head_dim]; query is [N, num_heads, head_dim], kv [N, 2, num_kv_heads * head_dim]."""
        shape, ids = self._shapes[layer], step.piece_ids[layer]
        self._kv.write(step.slot_ids[layer], kv)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        window, scores, num_kv_heads = shape.window, shape.scores, shape.num_kv_heads
        for group in step.groups:
            kernels.decode_attention(query, self._kv, ids, group, window is not None, scores, num_kv_heads, out)
        for chunk in step.chunks:
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            chunk_ids = ids[chunk.first_id : chunk.first_id + chunk.num_ids]
            kernels.chunk_attention(
                query[tokens], self._kv, chunk_ids, chunk.start, window, scores, num_kv_heads, out[tokens]
            )
        return out.flatten(1)
