"""A layer's attention over a step: writes keys and values into the paged pool, then serves decode groups and chunks.

Knows the pool's shape, not which sequence owns a block.
"""

from __future__ import annotations

import torch

from baton import kernels
from baton.models.config import ModelConfig
from baton.models.cpu.step_batch import PoolShape, StepBatch
from baton.models.layers import GroupedAttention, LatentAttention, describe
from baton.models.partition import ONLY_STAGE, WHOLE, Rank, Stage


class PagedAttention:
    """A rank's attention over the pool of its stage, with blocks of so many tokens, all key heads and the stage's
    layers, which are counted from its first."""

    def __init__(
        self,
        config: ModelConfig,
        kv: kernels.PagedKv,
        block_tokens: int,
        element_bytes: int,
        rank: Rank = WHOLE,
        draft: GroupedAttention | None = None,
        stage: Stage = ONLY_STAGE,
    ) -> None:
        """element_bytes: of the numbers that are gathered. draft: of the draft whose layer lies behind the model's."""
        self._kv = kv
        units = rank.key_heads(config.num_kv_heads)
        self.shape = PoolShape(
            num_units=config.num_kv_heads,
            units=units,
            num_layers=len(stage.layers(config.num_layers)) + (draft is not None),
            block_tokens=block_tokens,
            token_bytes=config.kv_planes * len(units) * config.head_dim * element_bytes,
            num_planes=config.kv_planes,
        )
        self._shapes = [shape.attention for shape in describe(config, rank, stage)]
        if draft is not None:
            self._shapes.append(draft)

    def write(self, layer: int, kv: torch.Tensor, step: StepBatch) -> None:
        """Keys and values of the step's tokens alone."""
        self._kv.write(step.slot_ids[layer], kv)

    def __call__(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, step: StepBatch, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[N, num_heads * head_dim]; query is [N, num_heads, head_dim], kv [N, 2, num_kv_heads * head_dim]. Of latent
        attention [N, num_heads * latent_dim]; query is absorbed, kv [N, 1, latent_dim + rotated_dim]. sinks:
        [num_heads], scores without values."""
        shape, ids = self._shapes[layer], step.piece_ids[layer]
        self._kv.write(step.slot_ids[layer], kv)
        if isinstance(shape, LatentAttention):
            window, num_kv_heads, dim = None, 1, shape.dims.latent_dim
        else:
            window, num_kv_heads, dim = shape.window, shape.num_kv_heads, shape.head_dim
        out = query.new_empty(*query.shape[:2], dim)
        rest, planes = (shape.scores, num_kv_heads), self.shape.num_planes
        for group in step.groups:
            kernels.decode_attention(query, self._kv, ids, group, window is not None, *rest, out, planes, sinks)
        for chunk in step.chunks:
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            chunk_ids = ids[chunk.first_id : chunk.first_id + chunk.num_ids]
            placed = query[tokens], self._kv, chunk_ids, chunk.start, window
            kernels.chunk_attention(*placed, *rest, out[tokens], planes, sinks)
        return out.flatten(1)
