"""A stage before the last of a pipeline, on one GPU: launches its layers of steps of prompts, with which the next stage
goes on. The last one is a `runner.CudaRunner`.

    stage = AdvancingStage(config, weights, queue, limits, max_len, Stage(0, 2))
    stage.bind_pool(pool, max_model_len)                     # compiles and captures the steps
    left = stage.advance(rows); ...; left.wait()             # the residual, once it is there
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.models.batch import Row
from baton.models.config import ModelConfig
from baton.models.cuda.chunk_forward import CHUNK_SEQUENCES, ChunkForward
from baton.models.cuda.chunk_upload import ChunkUpload
from baton.models.cuda.chunks import TABLE_WIDTH, num_tokens_of
from baton.models.cuda.context_memory import ContextMemory
from baton.models.cuda.decoder import DeviceDecoder
from baton.models.cuda.limits import StepLimits, check_supported
from baton.models.cuda.pool_binding import paged_pool
from baton.models.cuda.prefill_pieces import PrefillPieces
from baton.models.cuda.products import Policy, fastest, invariant
from baton.models.cuda.queue import Queue, aligned
from baton.models.cuda.residuals import EnteringResiduals, LeavingResiduals, LeftResidual, ResidualSlots, pinned_slots
from baton.models.cuda.slots import Slots
from baton.models.cuda.warm_up import warm_up_steps
from baton.models.kv_format import KvFormat
from baton.models.layer_weights import Weights
from baton.models.partition import WHOLE, Stage, part_of
from baton.node.errors import InvariantBroken


class AdvancingStage:
    """Launches steps of one stage's layers over its pool. One thread makes all calls; any may wait for what left."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        queue: Queue,
        limits: StepLimits,
        max_len: int,
        stage: Stage,
        policy: Policy | None = None,
        kv_format: KvFormat | None = None,
        leaving: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """config: of the whole model. leaving: ResidualSlots in pinned memory, by default of this process alone. The
        rest as CudaRunner has it."""
        own = part_of(config, WHOLE, stage)
        check_supported(own)
        self.config, self._own, self._stage = config, own, stage
        self.queue, self._limits, self.run_ahead = queue, limits, limits.run_ahead
        policy = policy or (invariant if limits.deterministic else fastest)
        self._decoder = DeviceDecoder(own, weights, policy, limits.step_tokens, 0, max_len, stage=stage)
        self.dtype = self._decoder.dtype
        self.kv_format = kv_format or KvFormat.plain(self.dtype)
        widened = self.dtype if self.kv_format.quantised else None
        self._context = ContextMemory(own, weights, queue, limits, max_len, widened)
        residual = self._decoder.residual(limits.step_tokens)
        self._entering = EnteringResiduals(residual, stage)
        slots = leaving or pinned_slots(queue, ResidualSlots.of(limits, config.hidden_size, self.dtype))
        self._leaving = LeavingResiduals(queue, residual, slots)
        self._forward: ChunkForward | None = None
        self._longest, self._block_tokens = max_len, 1

    def bind_pool(self, pool: torch.Tensor, max_model_len: int, scales: torch.Tensor | None = None) -> None:
        """As CudaRunner; the pool has this stage's layers."""
        queue, limits, block_tokens = self.queue, self._limits, pool.shape[4]
        self._longest, self._block_tokens = max_model_len, block_tokens
        own, layers = self._own, self._stage.layers(self.config.num_layers)
        kv_format = self.kv_format.part(layers, range(own.num_kv_heads))
        paged = paged_pool(pool, scales, own, own.num_layers, kv_format)
        width = aligned(-(-max_model_len // block_tokens), TABLE_WIDTH)
        slots = Slots(limits.max_rows, width, queue.device)
        self._decoder.bind_pool(paged)
        attention = self._context.over_pool(paged)
        upload = ChunkUpload(queue, limits, slots, block_tokens, own.num_heads, attention, None)
        pieces = PrefillPieces(queue, self._decoder, limits, upload)
        captured_width = self._context.captured_width(width, CHUNK_SEQUENCES, block_tokens)
        self._forward = forward = ChunkForward(queue, self._decoder, limits, upload, pieces, captured_width)

        def capture_all() -> None:
            forward.capture_all()
            pieces.capture_all()

        def rehearse() -> None:
            with self._decoder.abridged():
                capture_all()
                self.warm_up()

        queue.rehearse(rehearse)
        capture_all()

    def warm_up(self) -> None:
        """As CudaRunner."""
        for rows in warm_up_steps(self._limits, self._longest, self._block_tokens):
            self.advance(rows, self._entering.of_zeros(num_tokens_of(rows))).wait()

    def advance(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> LeftResidual:
        """Launch a step. entering: [N, hidden], what the stage before has made of its tokens, in pinned memory that
        does not change before the step has run."""
        if self._forward is None:
            raise InvariantBroken("no pool is bound")
        num_tokens = num_tokens_of(rows)
        sent, forward = self._forward.prepare(rows)
        enter = self._entering.of(entering, num_tokens)

        def work() -> None:
            enter(len(sent.tokens))
            forward()

        self.queue.enqueue(work)
        return self._leaving.take(num_tokens)
