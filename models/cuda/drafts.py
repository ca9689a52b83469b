"""Drafts on the GPU: what is kept of each slot for them, and the launches that lay out, accept and propose them.

    drafts.begin(row, max_len); drafts.flush()                  # a row that brings its own tokens
    drafts.offer(rows)                                          # of rows with masks: what the host makes masks for
    drafts.gather(header, tables, block_tokens, inputs)         # before the step's layers
    drafts.take_in(drawn, slots)                                # behind its draws

The last two only launch kernels on fixed memory. The host learns a step later how far its sequences are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from baton.kernels.triton import draft_inputs as columns
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.draft_inputs import Places, gather_drafts
from baton.kernels.triton.drafts import IDS, SlotDrafts, accept, propose
from baton.kernels.triton.forced_drafts import offer_drafts
from baton.kernels.triton.sampling_rows import SlotTables
from baton.kernels.triton.step_inputs import StepInputs, set_entries
from baton.models.batch import Row
from baton.models.cuda.queue import ALIGNED, Queue, Upload, copy_async
from baton.models.drafts import FOLLOWED_MATCH, LEAST_MATCH, LONGEST_MATCH, MOST_ANSWER_TOKENS, SEARCHED
from baton.node.messages.control import MAX_PREDICTION_TOKENS


class DraftSlots:
    """`num_slots` slots and the one of padding behind them, with up to `most_drafts` drafts each; steps of up to
    `num_tokens` tokens; sequences of up to `max_len`."""

    def __init__(self, queue: Queue, num_slots: int, num_tokens: int, most_drafts: int, max_len: int) -> None:
        self.most_drafts = most_drafts
        self._queue, self._max_len = queue, max_len
        room = max_len + most_drafts + 1
        before = MAX_PREDICTION_TOKENS + MOST_ANSWER_TOKENS
        self.kept = SlotDrafts.make(num_slots + 1, most_drafts, before, room, queue.device)
        self.places = Places.make(num_tokens, queue.device)
        width = IDS.value + most_drafts + 1
        self.results = torch.zeros(num_tokens, width, dtype=torch.int32, device=queue.device)
        """int32 [rows, width], see kernels.triton.drafts: of the step that ran last."""
        self._upload = Upload(queue, 2 * num_slots * columns.COLUMNS.value)
        self._most_forced = 2 * (most_drafts + 1)
        self._forced = Upload(queue, num_slots * (3 + self._most_forced) + 4 * ALIGNED)
        self._offered = torch.zeros(num_slots, 1 + most_drafts, dtype=torch.int32, device=queue.device)
        self._begun: dict[int, np.ndarray] = {}
        self.before_accept: Callable[[torch.Tensor], None] = _nothing
        """Called with what was drawn before it is compared with the drafts: where their acceptance is simulated."""
        self.counted: SlotTables | None = None
        """What is accepted counts there for penalties and bad words."""

    def begin(self, row: Row, max_len: int) -> None:
        """From the next `flush` on the row's slot has its sequence, of up to `max_len` tokens. Drafts are looked for
        behind them if its draw knows them."""
        draw = row.draw
        assert draw is not None and row.token_ids, "a row that brings its tokens, and draws"
        length = row.start + len(row.token_ids)
        searches = len(draw.history) >= length
        predicted, answers = (draw.prediction, draw.past_answers) if searches else ((), ())
        line = np.zeros(columns.COLUMNS.value, dtype=np.int32)
        line[columns.LENGTH.value] = length
        line[columns.LIMIT.value] = min(max_len, draw.prompt_len + draw.sampling.max_tokens)
        line[columns.LAST.value] = row.token_ids[-1]
        line[columns.SEARCHES.value] = searches
        line[columns.NUM_PREDICTED.value], line[columns.NUM_ANSWERS.value] = len(predicted), len(answers)
        self._begun[row.slot] = line
        if searches:
            text = np.fromiter((*answers, *predicted, *draw.history[:length]), dtype=np.int32)
            first = self.kept.begin - len(predicted) - len(answers)
            sent = self._queue.host_buffer(text.size)
            sent.numpy()[:] = text
            target = self.kept.text[row.slot, first : first + text.size]
            self._queue.enqueue(lambda: copy_async(target, sent))

    def flush(self) -> None:
        """Enqueue what has begun."""
        if not self._begun:
            return
        width = columns.COLUMNS.value
        slots = np.array(list(self._begun), dtype=np.int32)
        places = slots[:, None] * width + np.arange(width, dtype=np.int32)
        sent_places, sent = self._upload.send((places, np.stack(list(self._begun.values()))))
        self._queue.enqueue(lambda: set_entries(self.kept.state.view(-1), sent_places, sent))
        self._begun.clear()

    def offer(self, rows: Sequence[Row]) -> torch.Tensor:
        """Enqueue that forced tokens of these rows' draws come before other drafts. Of each row how many drafts it has
        then, and which, int32 [rows, 1 + most drafts]: filled before what is enqueued next."""
        draws = [row.draw for row in rows if row.draw is not None]
        assert len(draws) == len(rows), "only rows that draw have drafts"
        forced = np.zeros((len(rows), self._most_forced), dtype=np.int32)
        counts = np.array([min(len(draw.forced), self._most_forced) for draw in draws], dtype=np.int32)
        for line, draw, count in zip(forced, draws, counts.tolist(), strict=True):
            line[:count] = draw.forced[:count]
        known = np.array([len(draw.history) for draw in draws], dtype=np.int32)
        slots = np.array([row.slot for row in rows], dtype=np.int32)
        sent_slots, sent_known, sent_counts, sent = self._forced.send((slots, known, counts, forced))
        offered, lines = self._offered[: len(rows)], sent.view(len(rows), self._most_forced)
        self._queue.enqueue(lambda: offer_drafts(sent_slots, sent_known, sent_counts, lines, self.kept, offered))
        return offered

    def gather(
        self,
        slots: torch.Tensor,
        most: torch.Tensor,
        tables: torch.Tensor,
        block_tokens: int,
        inputs: StepInputs,
        queries: int = 1,
    ) -> None:
        """Fills `inputs` for rows of these slots, with up to `most` drafts each, int32 [rows], -1: padding. queries:
        tokens of a sequence that attention takes together."""
        kept = self.kept
        gather_drafts(slots, most, kept.state, kept.drafts, tables, block_tokens, inputs, self.places, queries)

    def share_out(self, lengths: torch.Tensor, plan: DecodePlan, work: torch.Tensor) -> None:
        """Attention's work for the tokens that `gather` laid out last."""
        count = len(lengths)
        share_out(lengths, plan, work, self.places.queries[:count], self.places.first[:count])

    @property
    def slots(self) -> torch.Tensor:
        """int32 [tokens]: those of the tokens that `gather` laid out last."""
        return self.places.slots

    def take_in(self, drawn: torch.Tensor, slots: torch.Tensor, *, first_without: int | None = None) -> None:
        """Accept what was drawn for rows of these slots, and propose what may follow; rows from number `first_without`
        on were not laid out by `gather`, and have no drafts."""
        self.accept(drawn, slots, first_without=first_without)
        results = self.results[: len(slots)]
        propose(
            slots, self.places, self.kept, results, searched=SEARCHED, longest=LONGEST_MATCH, least=LEAST_MATCH,
            followed=FOLLOWED_MATCH,
        )  # fmt: skip

    def accept(self, drawn: torch.Tensor, slots: torch.Tensor, *, first_without: int | None = None) -> None:
        """The first half of `take_in`; what proposes is something else."""
        if first_without is not None:
            self.places.taken[first_without : len(slots)].zero_()
        self.before_accept(drawn)
        accept(drawn, slots, self.places, self.kept, self.results[: len(slots)], self.counted)


def _nothing(drawn: torch.Tensor) -> None:
    """Drafts are compared as they are."""
