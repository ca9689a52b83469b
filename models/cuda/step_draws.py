"""What steps on a GPU draw: next tokens from logits, kept for their slots and brought to a step's result.

With drafts what is drawn is compared with them first, and slots keep what was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from baton.kernels.triton.step_inputs import set_entries
from baton.models.batch import Row
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.eagle import DeviceEagle
from baton.models.cuda.launched import StepResult
from baton.models.cuda.slots import Slots, SlotSampler

WholeLogits = Callable[[torch.Tensor], torch.Tensor]
"""Logits of all tokens, [rows, vocab], of those that a rank has; where ranks share them all ranks call it."""


class StepDraws:
    """Draws of steps over one pool; launches alone, on fixed memory."""

    def __init__(
        self,
        sampler: SlotSampler,
        whole: WholeLogits,
        drawn: torch.Tensor,
        slots: Slots,
        block_tokens: int,
        drafts: DraftSlots | None,
        eagle: DeviceEagle | None,
    ) -> None:
        """drawn: int32 [tokens that a step draws at most], for the tokens."""
        self.sampler, self.drawn = sampler, drawn
        self._whole, self._slots, self._block_tokens = whole, slots, block_tokens
        self._drafts, self._eagle = drafts, eagle

    def edits(self, rows: Sequence[Row]) -> bool:
        """Whether any of these rows needs more than a temperature."""
        return any(self.sampler.edits(row.slot) for row in rows)

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, edited: bool) -> None:
        """The next token of each row; `edited`: with every parameter, else a temperature alone."""
        drawn = self.drawn[: len(slots)]
        if edited:
            self.sampler.draw_edited(self._whole(logits), slots, positions, drawn)
        else:
            self.sampler.draw(logits, slots, positions, drawn)
        if self._drafts is None:
            set_entries(self._slots.last, slots, drawn)

    def take_in(self, slots: torch.Tensor, *, first_without: int) -> None:
        """What was drawn in a step with parts of prompts, for rows of these slots; those from number `first_without` on
        had no drafts. Nothing without drafts."""
        if self._drafts is None:
            return
        drawn = self.drawn[: len(slots)]
        if self._eagle is None:
            self._drafts.take_in(drawn, slots, first_without=first_without)
        else:
            self._drafts.accept(drawn, slots, first_without=first_without)
            self._eagle.forget(slots, self._drafts, self._slots.tables, self._block_tokens)

    def bring(
        self, rows: Sequence[Row], slots: torch.Tensor, result: StepResult, first: int, place: int
    ) -> Callable[[torch.Tensor], None]:
        """What brings tokens that were drawn for these rows, from logits of the tokens of these slots, [tokens, V], to
        the rows of the result from `first` on, and log probabilities to its places from `place` on."""
        drawn = self.drawn[: len(slots)]
        wanted = any(self.sampler.num_top(row.slot) is not None for row in rows)

        def work(logits: torch.Tensor) -> None:
            if self._drafts is None:
                result.take_tokens(first, drawn)
            else:
                result.take_accepted(first, self._drafts.results[: len(rows)])
            if wanted:
                self.sampler.logprobs(self._whole(logits), slots, drawn)
                result.take_logprobs(place, len(slots), self.sampler.found)

        return work
