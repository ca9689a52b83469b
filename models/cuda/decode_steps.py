"""Decode steps on a GPU: a ladder of captured ones over one pool, and how a step is launched as the next larger one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.batch import Row
from baton.models.cuda.adapter_steps import AdapterSteps
from baton.models.cuda.attention import Attend
from baton.models.cuda.decode_plans import DecodePlans
from baton.models.cuda.decode_rows import DecodeRows
from baton.models.cuda.draft_budget import BudgetChoice
from baton.models.cuda.draft_graphs import DraftGraphs
from baton.models.cuda.graphs import DecodeGraphs, lengths_up_to, sizes_up_to
from baton.models.cuda.launched import StepResult
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Draws, Queue, QueueMark, Work
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.cuda.step_draws import StepDraws
from baton.models.weights import Progress, no_progress

FIXED_LENGTHS = (2048, 4)
"""First length and factor of the lengths that get graphs of their own where chunks are fixed: there a graph has a
program for each chunk of its longest row, whether the row is so long or not."""
PDL_ROWS = 128
"""With more rows, kernels that start early take more than they give."""
TIMED_STEPS = 4


class RowsBeside(NamedTuple):
    """Rows that decode in one pass with parts of prompts, padded as in their graph."""

    inputs: StepInputs
    attend: Callable[[AdapterRows | None], Attend]
    """Of these rows, with the adapters of the pass."""
    gather: Work
    """Launches what fills `inputs`."""


class DecodeSteps:
    """Steps of rows that continue what their slots drew last, one token each or with drafts behind it."""

    def __init__(
        self,
        queue: Queue,
        decoder: StepDecoder,
        limits: StepLimits,
        longest: int,
        rows: DecodeRows,
        plans: DecodePlans,
        draws: StepDraws,
        adapters: AdapterSteps | None,
        after: DraftGraphs | None,
    ) -> None:
        """longest: tokens of a sequence at most. after: what follows the draws, where there are drafts."""
        self._queue, self._decoder, self._rows, self._plans, self._draws = queue, decoder, rows, plans, draws
        self._adapters, self._after, self._longest = adapters, after, longest
        self._sizes = sizes = sizes_up_to(limits.decode_tokens)
        lengths = lengths_up_to(longest, *FIXED_LENGTHS) if limits.deterministic else (longest,)
        planned = (plans.of_step(size, length) for size in sizes for length in lengths)
        self._scratch = plans.scratch(planned, queue.device)
        self._graphs = DecodeGraphs(self._capture, sizes, lengths, self._body)
        # Steps with rows that have adapters; those without run as if there were none.
        self._adapted = DecodeGraphs(self._capture, sizes, lengths, partial(self._body, adapted=True))
        # Drawing alone, for steps with a row that asks for more than a temperature: one kernel after the other would
        # take the host longer than the GPU.
        self._edited = DecodeGraphs(queue.capture, sizes, (longest,), self._edited_body)

    def capture_all(self, on_progress: Progress) -> None:
        """In place of what was captured before."""
        self._rows.send_padding()  # captures run on padding alone
        self._graphs.capture_all(on_progress)
        if self._adapters is not None:
            self._adapted.capture_all(on_progress)
        self._edited.capture_all(no_progress)

    def size_for(self, num_rows: int) -> int:
        """Tokens of the graph that runs so many rows."""
        return self._graphs.size_for(num_rows)

    def times(self) -> Iterator[tuple[int, float]]:
        """Numbers of tokens, and the seconds that a step of them takes without context."""
        self._rows.send_padding()
        for size in self._sizes:
            graph = self._graphs.graph_for(size, 1)
            begun = self._queue.mark()
            for _ in range(TIMED_STEPS):
                self._queue.enqueue(graph)
            ended = self._queue.mark()
            ended.wait()
            yield size, ended.since(begun) / TIMED_STEPS or 1.0

    def beside(self, rows: Sequence[Row]) -> RowsBeside:
        """Sends these rows, for a step that computes them with parts of prompts."""
        padded, longest = self._graphs.size_for(len(rows)), self._graphs.length_for(self._rows.longest_of(rows))
        sent = self._rows.send(rows)
        inputs, plan = self._rows.inputs.first(padded), self._plans.of_step(padded, longest)

        def gather() -> None:
            self._rows.write_tables(sent)
            self._rows.gather(inputs, plan, self._scratch.work)

        attend = partial(self._decoder.attend_rows, inputs, plan, self._scratch, self._pdl(padded))
        return RowsBeside(inputs, attend, gather)

    def launch(
        self,
        rows: Sequence[Row],
        result: StepResult,
        draws: Draws,
        choice: BudgetChoice | None,
        *,
        keep_logits: bool,
    ) -> QueueMark:
        """Returns its begin on the device. `keep_logits`: another launch writes its own before these rows draw."""
        count = len(rows)
        num_tokens = count if choice is None else choice.tokens
        graph = self._graphs_of(rows).graph_for(num_tokens, self._rows.longest_of(rows))
        sent = self._rows.send(rows, drafting=choice is not None)
        edited = self._edited.graph_for(num_tokens, 1) if self._draws.edits(rows) else None
        accepted = proposed = None
        slots = sent.slots
        if self._after is not None:
            accepted = self._after.accept(num_tokens)
            if choice is not None:
                slots = self._rows.slots_of(num_tokens)
                proposed = self._after.propose(count) if choice.proposes else None
        bring = self._draws.bring(rows, slots, result, 0, 0)
        kept: list[torch.Tensor] = []

        def forward() -> None:
            self._rows.write_tables(sent)
            graph()
            if keep_logits:
                kept.append(self._decoder.last_logits(count).clone())

        def choose() -> None:
            if kept:
                self._draws.draw(kept[0], sent.slots, self._rows.inputs.lengths[:count], edited=True)
            elif edited is not None:  # the graph drew as if a temperature were all
                edited()
            if kept and self._after is not None and self._after.by_model:  # hidden states are no longer there
                self._draws.take_in(self._rows.slots_of(count), first_without=count)
            elif accepted is not None:
                accepted()
            if proposed is not None:
                proposed()
            bring(kept[0] if kept else self._decoder.last_logits(num_tokens))

        begun = self._queue.mark()
        draws.launch(forward, choose)
        return begun

    def _graphs_of(self, rows: Sequence[Row]) -> DecodeGraphs:
        """With adapters if any of these rows has one; then the device gets to know which have which."""
        if all(row.adapter is None for row in rows):
            return self._graphs
        assert self._adapters is not None, "a row with an adapter, and no slots"
        self._adapters.update(rows)
        return self._adapted

    def _capture(self, work: Work) -> Work:
        """As one launch, where the model can be captured."""
        return self._queue.capture(work) if self._decoder.captured else work

    def _body(self, num_tokens: int, max_len: int, *, adapted: bool = False) -> Work:
        """The launches of a step, whose rows lie where `send` puts them."""
        inputs, slots = self._rows.inputs.first(num_tokens), self._rows.slots_of(num_tokens)
        plan, pdl = self._plans.of_step(num_tokens, max_len), self._pdl(num_tokens)

        def body() -> None:
            self._rows.gather(inputs, plan, self._scratch.work)
            adapters = None
            if adapted:
                assert self._adapters is not None, "steps with adapters, and no slots"
                adapters = self._adapters.group(slots)
            logits = self._decoder.decode(inputs, plan, self._scratch, pdl, adapters)
            self._draws.draw(logits, slots, inputs.lengths, edited=False)

        return body

    def _edited_body(self, num_tokens: int, max_len: int) -> Work:
        """Draws anew, with every parameter, what a step of any length drew."""
        slots, positions = self._rows.slots_of(num_tokens), self._rows.inputs.lengths[:num_tokens]
        logits = self._decoder.last_logits(num_tokens)
        return partial(self._draws.draw, logits, slots, positions, edited=True)

    def _pdl(self, num_tokens: int) -> bool:
        return self._queue.pdl and num_tokens <= PDL_ROWS
