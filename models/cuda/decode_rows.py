"""The rows of decode steps on a GPU: what the host sends of them, and how a step's tokens are made of that.

    sent = rows.send(decoding, drafting=False)      # before the step: enqueues one copy
    rows.write_tables(sent); rows.gather(inputs, plan, work)     # in it: launches on fixed memory

Rows that only fill a graph have the slot of padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.step_inputs import StepInputs, gather_inputs, set_entries
from baton.models.batch import Row
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Queue, Upload, aligned
from baton.models.cuda.slots import Slots


class SentRows(NamedTuple):
    """int32, on the device until the next rows are sent."""

    slots: torch.Tensor  # [rows]
    places: torch.Tensor  # [blocks that are new]: in the flat tables
    blocks: torch.Tensor  # [blocks that are new]


class DecodeRows:
    """Of steps of up to limits.max_rows rows. With drafts a row is one or more tokens, else one."""

    def __init__(
        self,
        queue: Queue,
        limits: StepLimits,
        slots: Slots,
        block_tokens: int,
        longest: int,
        drafts: DraftSlots | None,
    ) -> None:
        """longest: tokens of a sequence at most."""
        self.slots, self.block_tokens = slots, block_tokens
        self._longest, self._drafts, self._columns = longest, drafts, aligned(limits.max_rows)
        width = slots.tables.shape[1]
        self.inputs = StepInputs.make(limits.decode_tokens, width, queue.device)
        self._upload = Upload(queue, 3 * self._columns + 2 * aligned(limits.max_rows * width))

    def send(self, rows: Sequence[Row], *, drafting: bool = False) -> SentRows:
        """drafting: they may have drafts in this step."""
        header, places, blocks = self._upload.send((self._header(rows, drafting), *self.slots.changes(rows)))
        return SentRows(header[: len(rows)], places, blocks)

    def send_padding(self) -> None:
        """For steps without any row."""
        self._upload.send((self._header((), drafting=False),))

    def write_tables(self, sent: SentRows) -> None:
        """Launches that bring new blocks into the slots' tables."""
        set_entries(self.slots.tables.view(-1), sent.places, sent.blocks)

    def gather(self, inputs: StepInputs, plan: DecodePlan, work: torch.Tensor) -> None:
        """Launches that make the tokens of the rows that were sent last, with what their slots keep, and share out
        attention's work for them."""
        if self._drafts is not None:
            drafts, tables = self._drafts, self.slots.tables
            drafts.gather(self.header[0], self.header[1], tables, self.block_tokens, inputs, plan.queries)
            drafts.share_out(inputs.lengths, plan, work)
        else:
            slots, positions, given = self.header[:, : len(inputs.tokens)]
            gather_inputs(slots, positions, given, self.slots.last, self.slots.tables, self.block_tokens, inputs)
            share_out(inputs.lengths, plan, work)

    @property
    def header(self) -> torch.Tensor:
        """int32 [3, max_rows rounded up], on the device, as `_header` makes it."""
        return self._upload.there[: 3 * self._columns].view(3, -1)

    def slots_of(self, num_tokens: int) -> torch.Tensor:
        """int32 [tokens]: the slots of a step's tokens, on the device."""
        return self.header[0, :num_tokens] if self._drafts is None else self._drafts.slots[:num_tokens]

    def longest_of(self, rows: Sequence[Row]) -> int:
        """Tokens of the longest row; with drafts in flight, those that its blocks have room for."""
        if self._drafts is None:
            return max(row.start for row in rows) + 1
        return min(self._longest, max(len(row.blocks) for row in rows) * self.block_tokens)

    def _header(self, rows: Sequence[Row], drafting: bool) -> np.ndarray:
        """int32 [3, max_rows rounded up]: slots, positions and given tokens; the rest is padding. In the place of
        positions, where there are drafts: how many each row may have; behind, for how many tokens its blocks have
        room."""
        count, header = len(rows), np.full((3, self._columns), -1, dtype=np.int32)
        header[0, :count] = [row.slot for row in rows]
        header[0, count:] = self.slots.padding
        if self._drafts is not None:
            header[1, :count] = [row.most_drafts if drafting else 0 for row in rows]
            header[2, :count] = [len(row.blocks) * self.block_tokens for row in rows]
            return header
        header[1, :count] = [row.start for row in rows]
        header[2, :count] = [row.token_ids[0] if row.token_ids else -1 for row in rows]
        return header
