"""Entries of a model that drafts, for parts of prompts: each is of a token's hidden states and the token behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from baton.kernels.triton.step_inputs import set_entries
from baton.models.batch import Row
from baton.models.cuda.eagle import DeviceEagle
from baton.models.cuda.queue import ALIGNED, Queue, Upload, aligned

WriteEntries = Callable[[bool], None]
"""Called with whether the step's tokens are drawn. Where masks come later, it is called before: blocks may be read from
then on, and the last entry is of a token that is not known."""


class PromptEntries:
    """Of steps of up to most_tokens tokens; without a model nothing is written."""

    def __init__(self, queue: Queue, eagle: DeviceEagle | None, most_tokens: int) -> None:
        self._eagle = eagle
        self._following = None if eagle is None else Upload(queue, most_tokens + ALIGNED)

    def of(
        self,
        rows: Sequence[Row],
        padded: int,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        last: torch.Tensor,
        drawn: torch.Tensor,
    ) -> WriteEntries:
        """Writes those of a step of parts of prompts behind `padded` other tokens; `last`: of each row that draws, the
        token that its draw follows; drawn: those draws. All int32."""
        eagle, following = self._eagle, self._following
        if eagle is None or following is None:
            return _write_nothing
        known = np.zeros(aligned(padded + sum(row.num_new for row in rows)), dtype=np.int32)
        at = padded
        for row in rows:
            known[at : at + row.num_new - 1] = row.token_ids[1:]
            known[at + row.num_new - 1] = row.token_ids[-1] if row.following is None else row.following
            at += row.num_new
        (sent,) = following.send((known,))
        tokens = sent[: len(positions)]

        def write(is_drawn: bool) -> None:
            if is_drawn and len(last):
                set_entries(tokens, last, drawn[: len(last)])
            eagle.write(tokens, positions, kv_slots)

        return write


def _write_nothing(is_drawn: bool) -> None:
    """There is no model that drafts."""
