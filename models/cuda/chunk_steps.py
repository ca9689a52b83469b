"""Steps on a GPU of parts of prompts alone, and what they draw. Those whose prompts are scored run op by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.models.batch import Row
from baton.models.cuda.chunk_forward import ChunkForward
from baton.models.cuda.chunk_upload import ChunkUpload, SentChunks
from baton.models.cuda.launched import StepResult
from baton.models.cuda.prompt_entries import PromptEntries
from baton.models.cuda.prompt_scores import PromptScorer, targets_of
from baton.models.cuda.queue import Draws, Queue, QueueMark, Work
from baton.models.cuda.residuals import Enter, enter_nothing
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.cuda.step_draws import StepDraws


class ChunkSteps:
    """Of one runner, over one pool."""

    def __init__(
        self,
        queue: Queue,
        decoder: StepDecoder,
        upload: ChunkUpload,
        forward: ChunkForward,
        draws: StepDraws,
        entries: PromptEntries,
        scorer: PromptScorer,
        meet: Work,
    ) -> None:
        """meet: launched in a step that draws nothing, behind which all ranks have written their KV."""
        self._queue, self._decoder, self._upload, self._forward = queue, decoder, upload, forward
        self._draws, self._entries, self._scorer, self._meet = draws, entries, scorer, meet

    def launch(
        self, rows: Sequence[Row], result: StepResult, first: int, draws: Draws, enter: Enter = enter_nothing
    ) -> QueueMark:
        """Draws what they ask for to the places of `result` from `first` on. Returns its begin on the device. enter: of
        a stage behind the first."""
        sent, prefill = self._prepare(rows, result)
        drawing = [row for row in rows if row.draw is not None]
        slots, new_positions = sent.drawn_slots[: len(drawing)], sent.drawn_positions[: len(drawing)]
        last, num_tokens = sent.drawn_tokens[: len(drawing)], sum(row.num_new for row in rows)
        edited = self._draws.edits(drawing)
        bring = self._draws.bring(drawing, slots, result, first, result.chunk_places)
        places = sent.positions[:num_tokens], sent.kv_slots[:num_tokens]
        write = self._entries.of(rows, 0, *places, last, self._draws.drawn)

        def forward() -> None:
            enter(len(sent.tokens))
            prefill()
            if draws.deferred:
                write(False)

        def choose() -> None:
            if drawing:
                self._draws.draw(self._decoder.last_logits(len(drawing)), slots, new_positions, edited)
                self._draws.take_in(slots, first_without=0)
            else:
                self._meet()
            if not draws.deferred:
                write(True)
            if drawing:
                bring(self._decoder.last_logits(len(drawing)))

        begun = self._queue.mark()
        draws.launch(forward, choose)
        return begun

    def _prepare(self, rows: Sequence[Row], result: StepResult) -> tuple[SentChunks, Work]:
        """Sends them; with what computes them."""
        if all(row.targets is None for row in rows):
            return self._forward.prepare(rows)
        arrays = self._upload.lay_out(rows)
        sent = self._upload.send(arrays, rows, len(arrays.tokens), targets=targets_of(rows))
        return sent, self._scored(rows, sent, result)

    def _scored(self, rows: Sequence[Row], sent: SentChunks, result: StepResult) -> Work:
        """With log probabilities of the rows' targets: a few rows of logits at a time."""
        spans, take = self._scorer.of(rows, sent.targets)
        prefill: Callable[..., None] = self._decoder.prefill_scored

        def work() -> None:
            attend = self._upload.attend(sent)
            prefill(sent.tokens, sent.positions, sent.kv_slots, attend, sent.drawn_tokens, spans, take, sent.adapters)
            result.take_scores(len(sent.targets), self._scorer.found)

        return work
