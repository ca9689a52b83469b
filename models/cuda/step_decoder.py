"""What a runner asks of a model on a GPU: whole steps, token ids in, logits out. It knows no layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.cuda.attention import Attend


class StepDecoder(Protocol):
    """Steps over one pool, one after the other: nothing waits for the GPU, results lie in memory that does not move."""

    captured: bool
    """Whether its decode steps, and small steps of prompts, can be captured in a graph."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed."""
        ...

    def bind_pool(self, pool: PagedPool) -> None: ...

    def abridged(self) -> AbstractContextManager[None]:
        """Inside, steps may leave out what launches only what others launch, and compute nothing of use."""
        ...

    def decode(
        self,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        """Logits [rows, vocab] of one new token a row; with the rows' adapters, which only some models take."""
        ...

    def attend_rows(
        self,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        adapters: AdapterRows | None = None,
    ) -> Attend:
        """Attention of one new token a row; with the adapters of these rows, and of others behind them."""
        ...

    def last_logits(self, num_rows: int) -> torch.Tensor:
        """[num_rows, vocab] of the step that ran last, valid until the next runs."""
        ...

    def prefill(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        attend: Attend,
        drawn: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:
        """Logits of the tokens number `drawn` (int32) become `last_logits`; the other arrays are int32 [N]."""
        ...

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
        """As `prefill`; before, `take` gets the logits behind tokens begin .. end - 1 of each part, and its number.

        They are valid until it returns.
        """
        ...
