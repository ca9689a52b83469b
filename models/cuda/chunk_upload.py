"""Parts of prompts on their way to a GPU: a step's arrays as the kernels read them, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from baton.kernels.triton.adapter_rows import AdapterRows
from baton.models.batch import Row
from baton.models.cuda.adapter_steps import AdapterSteps, arrays_of, rows_of
from baton.models.cuda.attention import Attend, ChunkAttention
from baton.models.cuda.chunks import ChunkArrays, lay_out
from baton.models.cuda.latent import LatentChunks
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import ALIGNED, Queue, Upload
from baton.models.cuda.slots import Slots

NUM_ARRAYS = len(ChunkArrays._fields) + 1
"""With the targets of prompts that are scored."""
NO_TARGETS = np.empty(0, dtype=np.int32)


class SentChunks(NamedTuple):
    """ChunkArrays on the device, flat, until the next are sent."""

    tokens: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    query_starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    work: torch.Tensor
    drawn_tokens: torch.Tensor
    drawn_slots: torch.Tensor
    drawn_positions: torch.Tensor
    targets: torch.Tensor
    """[T]: tokens whose log probabilities are computed; mostly none."""
    adapters: AdapterRows | None


class ChunkUpload:
    """Lays out and sends the parts of prompts of steps over one pool."""

    def __init__(
        self,
        queue: Queue,
        limits: StepLimits,
        slots: Slots,
        block_tokens: int,
        num_heads: int,
        attention: ChunkAttention,
        adapters: AdapterSteps | None,
    ) -> None:
        """num_heads: query heads, of this rank."""
        self.slots, self.block_tokens, self.num_heads = slots, block_tokens, num_heads
        self._attention, self._adapters = attention, adapters
        tokens, rows = limits.step_tokens, limits.max_rows
        items = (tokens // attention.tile + rows) * num_heads
        tables = rows * (slots.tables.shape[1] + 5)
        of_adapters = 0 if adapters is None else adapters.capacity(tokens) + 4 * ALIGNED
        self._upload = Upload(queue, 4 * tokens + tables + 3 * items + NUM_ARRAYS * ALIGNED + of_adapters)

    @property
    def tile(self) -> int:
        """Tokens of one item of the work list."""
        return self._attention.tile

    def lay_out(self, rows: Sequence[Row]) -> ChunkArrays:
        """Of parts of prompts; their slots begin anew."""
        for row in rows:
            self.slots.begin(row.slot)
        return lay_out(rows, self.block_tokens, self.num_heads, self.tile)

    def send(
        self,
        arrays: ChunkArrays,
        rows: Sequence[Row],
        num_tokens: int,
        *,
        decoding: int = 0,
        padded: int = 0,
        targets: np.ndarray = NO_TARGETS,
    ) -> SentChunks:
        """Enqueue the copy. The arrays are of these rows, padded to num_tokens; the first `decoding` rows decode, and
        have `padded` tokens in front of the others, which the arrays leave out."""
        of_adapters = arrays_of(self._adapters, rows, padded, num_tokens, before=decoding)
        # Those of adapters first: captured steps of so many tokens find them in their place.
        sent = self._upload.send((*of_adapters, targets, *arrays))
        adapted, (sent_targets, *of_chunks) = sent[: len(of_adapters)], sent[len(of_adapters) :]
        return SentChunks._make([*of_chunks, sent_targets, rows_of(adapted) if adapted else None])

    def attend(self, sent: SentChunks) -> Attend:
        arrays = sent.tables.view(len(sent.lengths), -1), sent.query_starts, sent.lengths, sent.work.view(-1, 3)
        pairs = None
        if self._adapters is not None and sent.adapters is not None:
            before = len(sent.adapters.adapters) - len(sent.tokens)
            pairs = self._adapters.latent_pairs(sent.adapters, before)
        if pairs is None:
            return self._attention.over(*arrays)
        assert isinstance(self._attention, LatentChunks), "made of latents"
        return self._attention.over(*arrays, pairs)
