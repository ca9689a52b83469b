"""What follows the draws of a decode step with drafts, captured: taking in what was drawn, and proposing by a model.

Apart from the steps themselves, since it depends on how many tokens or rows a step has and not on how long they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from baton.models.cuda.decode_plans import DecodePlans
from baton.models.cuda.decode_rows import DecodeRows
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.eagle import DeviceEagle, DrawTokens
from baton.models.cuda.graphs import DecodeGraphs, sizes_up_to
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Queue, Work
from baton.models.weights import no_progress

ANY_LENGTH = 1
"""Of rows: these graphs are the same for all."""


class DraftGraphs:
    """Of one runner with drafts, over one pool."""

    def __init__(
        self,
        queue: Queue,
        limits: StepLimits,
        rows: DecodeRows,
        drawn: torch.Tensor,
        drafts: DraftSlots,
        eagle: DeviceEagle | None,
        plans: DecodePlans,
        draw: DrawTokens,
    ) -> None:
        """drawn: int32, the tokens that steps draw. eagle, plans, draw: a model that proposes in place of the search
        for matches, its attention and its draws."""
        self._queue, self._rows, self._drawn = queue, rows, drawn
        self._drafts, self._eagle, self._plans, self._draw = drafts, eagle, plans, draw
        self._row_sizes = sizes_up_to(limits.max_rows) if eagle is not None else ()
        sizes = sizes_up_to(limits.decode_tokens)
        self._accepted = DecodeGraphs(queue.capture, sizes, (ANY_LENGTH,), self._accepted_body)
        self._proposed = DecodeGraphs(queue.capture, self._row_sizes, (ANY_LENGTH,), self._proposed_body)

    @property
    def by_model(self) -> bool:
        """Whether a model proposes, from hidden states of the step that ran last."""
        return self._eagle is not None

    def capture_all(self) -> None:
        self._accepted.capture_all(no_progress)
        self._proposed.capture_all(no_progress)

    def accept(self, num_tokens: int) -> Work:
        """Takes in what a decode step of so many tokens drew; without a model it proposes what may follow, too."""
        return self._accepted.graph_for(num_tokens, ANY_LENGTH)

    def propose(self, num_rows: int) -> Work | None:
        """Proposes drafts by a model, behind a decode step of any length that was taken in; None: there is no model."""
        return None if self._eagle is None else self._proposed.graph_for(num_rows, ANY_LENGTH)

    def times(self) -> Iterator[tuple[int, float]]:
        """Numbers of rows, and the seconds that a model takes to propose for them."""
        for size in self._row_sizes:
            begun = self._queue.mark()
            self._queue.enqueue(self._proposed.graph_for(size, ANY_LENGTH))
            ended = self._queue.mark()
            ended.wait()
            yield size, ended.since(begun)

    def _accepted_body(self, num_tokens: int, max_len: int) -> Work:
        rows, drafts, eagle = self._rows, self._drafts, self._eagle
        drawn, slots, inputs = self._drawn[:num_tokens], rows.slots_of(num_tokens), rows.inputs.first(num_tokens)
        if eagle is None:
            return partial(drafts.take_in, drawn, slots)

        def body() -> None:
            drafts.accept(drawn, slots)
            eagle.write(drawn, inputs.positions, inputs.kv_slots)
            eagle.forget(slots, drafts, rows.slots.tables, rows.block_tokens)

        return body

    def _proposed_body(self, num_rows: int, max_len: int) -> Work:
        rows, eagle = self._rows, self._eagle
        assert eagle is not None, "drafts without a model"
        slots, covered, plan = rows.header[0, :num_rows], rows.header[2, :num_rows], self._plans.of_drafts(num_rows)
        return partial(
            eagle.propose, slots, covered, self._drafts, rows.slots.tables, rows.block_tokens, plan, self._draw
        )
