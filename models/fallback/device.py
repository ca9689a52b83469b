"""A transformers model as what a GPU's runner launches steps of: attention by the kernels of models.cuda.

Whole steps run in the library's code, over fixed buffers where results leave it, so that a decode step can be captured
where nothing in that code waits for the GPU. Queries and keys arrive with their positions in them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.kv_write import kv_write
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.config import ModelConfig
from baton.models.cuda.attention import Attend, attend_rows, grouped_shapes
from baton.models.cuda.queue import Queue, Work
from baton.models.fallback.attention import AttentionCall, listening
from baton.models.layers import describe
from baton.node.errors import InvariantBroken


class DeviceFallback:
    """models.cuda.step_decoder.StepDecoder of one model."""

    captured = False

    def __init__(
        self,
        config: ModelConfig,
        model: PreTrainedModel,
        calls: tuple[AttentionCall, ...],
        value_dim: int,
        max_tokens: int,
        max_drawn: int,
    ) -> None:
        """config: with the heads of the pool, in which the model's fit. calls: how each layer attends; value_dim: of a
        head. Room for steps of up to max_tokens tokens, of which up to max_drawn draw."""
        self._model, self._calls, self._value_dim = model, calls, value_dim
        self._shapes = grouped_shapes(describe(config))
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._logits = torch.zeros(max_drawn, config.vocab_size, dtype=model.dtype, device=model.device)
        # Padding is computed too, and must be finite: no kernel writes its rows.
        self._attended = torch.zeros(
            max_tokens, config.num_heads, config.head_dim, dtype=model.dtype, device=model.device
        )
        self._pool: PagedPool | None = None
        self.trial_step: Work | None = None
        """What a queue captured first: its memory for graphs is given up with the last of them, and not had again."""

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def size_bytes(self) -> int:
        return sum(each.nbytes for each in (*self._model.parameters(), *self._model.buffers()))

    def bind_pool(self, pool: PagedPool) -> None:
        self._pool = pool

    def reserve(self, num_tokens: int, queue: Queue) -> None:
        """Runs the largest step, so that the memory which it takes for a moment is the process's when a pool is planned
        from what is left. No key is written."""
        zeros = torch.zeros(num_tokens, dtype=torch.int32, device=queue.device)
        held: list[torch.Tensor] = []

        def hold(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            held[:] = query, out  # as attention does until the next layer's

        def step() -> None:
            kept = torch.arange(num_tokens, dtype=torch.int32, device=queue.device)
            self._forward(zeros, zeros, zeros - 1, hold, kept)
            held.clear()

        queue.enqueue(step)
        queue.mark().wait()

    def abridged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def decode(
        self,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        """Without early launches, whatever pdl: the library's kernels between these do not wait for the one before."""
        attend = self.attend_rows(inputs, plan, scratch, False)
        logits = self._forward(inputs.tokens, inputs.positions, inputs.kv_slots, attend, None)
        return self._keep(logits)

    def attend_rows(
        self,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        adapters: AdapterRows | None = None,
    ) -> Attend:
        return attend_rows(self._shapes, [None] * len(self._shapes), self._bound(), inputs, plan, scratch, pdl)

    def last_logits(self, num_rows: int) -> torch.Tensor:
        return self._logits[:num_rows]

    def prefill(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        drawn: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:
        self._keep(self._forward(tokens, positions, kv_slots, attend, drawn))

    def prefill_scored(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        drawn: torch.Tensor,
        parts: Sequence[tuple[int, int]],
        take: Callable[[torch.Tensor, int], None],
        adapters: AdapterRows | None = None,
    ) -> None:
        ranges = [torch.arange(begin, end, dtype=drawn.dtype, device=drawn.device) for begin, end in parts]
        logits = self._forward(tokens, positions, kv_slots, attend, torch.cat((*ranges, drawn)))
        *scored, last = logits.split([*map(len, ranges), len(drawn)])
        for number, each in enumerate(scored):
            take(each.contiguous(), number)
        self._keep(last)

    def _keep(self, logits: torch.Tensor) -> torch.Tensor:
        kept = self._logits[: len(logits)]
        kept.copy_(logits)
        return kept

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits [kept, vocab] behind the tokens of these numbers, or behind all [N, vocab]."""
        out = self._attended[: len(tokens)]
        layers = _DeviceLayers(self._bound(), kv_slots, attend, self._calls, self._value_dim, out)
        with torch.inference_mode(), listening(layers):
            chosen = None if kept is None else kept.long()
            some = {} if chosen is None or not self._keeps_logits else {"logits_to_keep": chosen}
            found = self._model(
                input_ids=tokens.long()[None], position_ids=positions.long()[None], use_cache=False, **some
            )
            logits: torch.Tensor = found.logits[0]
            if chosen is not None and not some:
                logits = logits[chosen]
        if layers.next_layer != len(self._calls):
            raise InvariantBroken(f"{layers.next_layer} of {len(self._calls)} layers attended")
        return logits

    def _bound(self) -> PagedPool:
        if self._pool is None:
            raise InvariantBroken("no pool is bound")
        return self._pool


@dataclass(slots=True)
class _DeviceLayers:
    """The Listener of one step."""

    pool: PagedPool
    kv_slots: torch.Tensor
    attend: Attend
    calls: tuple[AttentionCall, ...]
    value_dim: int
    out: torch.Tensor
    """[N, H, D] of the pool; a layer's is read before the next one attends."""
    next_layer: int = field(default=0, init=False)

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        index = self.next_layer
        if index >= len(self.calls) or call != self.calls[index]:
            raise InvariantBroken(f"layer {call.layer} attends otherwise than it did at load")
        self.next_layer += 1
        kv_write(key, value, self.kv_slots, self.pool, index)
        if narrower := self.pool.head_dim - query.shape[2]:
            query = F.pad(query, (0, narrower))
        self.attend(index, query.contiguous(), self.out)
        return self.out[..., : self.value_dim]
