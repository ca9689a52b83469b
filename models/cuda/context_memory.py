"""Memory for the context of parts of prompts, where attention reads it in another form than the pool has it.

It is made with the weights and activations, since the pool is planned from what these leave.
"""

from __future__ import annotations

import torch

from baton.kernels.triton.pool import PagedPool
from baton.models.config import ModelConfig
from baton.models.cuda.attention import ChunkAttention, choose_attention, grouped_shapes
from baton.models.cuda.chunks import TABLE_WIDTH
from baton.models.cuda.latent import LatentContext
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Queue, aligned
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.layer_weights import Weights
from baton.models.layers import describe

WIDENED_BYTES, WIDENED_TOKENS = 512 << 20, 2048
"""For the context of the chunks of a step in one layer, where KV is quantised: 131,072 tokens of an 8B model. No more
than all rows' longest sequences, rounded up to as many tokens as tables are wide."""


class ContextMemory:
    """Attention of parts of prompts, before and after its pool is known."""

    def __init__(
        self,
        config: ModelConfig,
        model: Weights | StepDecoder,
        queue: Queue,
        limits: StepLimits,
        max_len: int,
        widened_dtype: torch.dtype | None,
    ) -> None:
        """config: of a rank or a stage of several, its part_of. widened_dtype: of queries, where KV is quantised;
        else None."""
        self._config, self._queue, self._deterministic = config, queue, limits.deterministic
        self._layers = [layer.shape for layer in model.layers] if isinstance(model, Weights) else describe(config)
        self._sinks = model.sinks if isinstance(model, Weights) else (None,) * config.num_layers
        most_context = limits.max_rows * aligned(max_len, WIDENED_TOKENS)
        self._widened: torch.Tensor | None = None
        if widened_dtype is not None and not limits.deterministic:
            token_elements = 2 * config.num_kv_heads * config.head_dim
            tokens = min(WIDENED_BYTES // widened_dtype.itemsize // token_elements, most_context)
            self._widened = torch.zeros(tokens * token_elements, dtype=widened_dtype, device=queue.device)
        self._latents: LatentContext | None = None
        if config.latent is not None:
            assert isinstance(model, Weights), "no other code runs latent attention"
            self._latents = LatentContext(model, limits.step_tokens, most_context, queue.num_sms)

    def over_pool(self, pool: PagedPool) -> ChunkAttention:
        if self._latents is not None:
            return self._latents.over_pool(pool)
        shapes = grouped_shapes(self._layers)
        return choose_attention(
            self._config, shapes, self._sinks, pool, self._queue, self._deterministic, self._widened
        )

    def captured_width(self, width: int, sequences: int, block_tokens: int) -> int:
        """Blocks of the tables of a captured step of so many sequences, of up to `width`; 0: none is captured."""
        if self._latents is None:
            return width
        # more slices are more launches, whether the context has them or not
        widest = self._latents.table_width(sequences, block_tokens)
        return min(width, widest // TABLE_WIDTH * TABLE_WIDTH)
