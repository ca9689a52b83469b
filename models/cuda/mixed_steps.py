"""Steps on a GPU of rows that decode and parts of prompts behind them: one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.models.batch import Row
from baton.models.cuda.chunk_upload import ChunkUpload
from baton.models.cuda.chunks import behind, with_tokens
from baton.models.cuda.decode_steps import DecodeSteps
from baton.models.cuda.launched import StepResult
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.prefill_pieces import PrefillPieces
from baton.models.cuda.prompt_entries import PromptEntries
from baton.models.cuda.queue import Draws, Queue, QueueMark
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.cuda.step_draws import StepDraws


class MixedSteps:
    """Of one runner, over one pool."""

    def __init__(
        self,
        queue: Queue,
        decoder: StepDecoder,
        limits: StepLimits,
        decode: DecodeSteps,
        upload: ChunkUpload,
        draws: StepDraws,
        entries: PromptEntries,
        pieces: PrefillPieces,
    ) -> None:
        self._queue, self._decoder, self._limits, self._decode = queue, decoder, limits, decode
        self._upload, self._draws, self._entries, self._pieces = upload, draws, entries, pieces

    def takes(self, decode: Sequence[Row], chunks: Sequence[Row]) -> bool:
        """Whether these rows are one pass; else they are two launches."""
        new = sum(row.num_new for row in chunks)
        scores = any(row.targets is not None for row in chunks)
        fits = bool(decode) and self._decode.size_for(len(decode)) + new <= self._limits.step_tokens
        return fits and not scores and new >= self._limits.least_mixed

    def launch(self, decode: Sequence[Row], chunks: Sequence[Row], result: StepResult, draws: Draws) -> QueueMark:
        """Rows that decode are padded as in their graph. Returns the step's begin on the device."""
        rows = self._decode.beside(decode)
        inputs, padded = rows.inputs, len(rows.inputs.tokens)
        arrays = self._upload.lay_out(chunks)
        own_tokens = padded + len(arrays.tokens)
        num_tokens = self._pieces.size_for(own_tokens) or own_tokens
        placed = behind(with_tokens(arrays, num_tokens - padded), decode, padded)
        sent = self._upload.send(placed, [*decode, *chunks], num_tokens, decoding=len(decode), padded=padded)
        attend_rows, attend_chunks = rows.attend(sent.adapters), self._upload.attend(sent)
        slots, new_positions, last = sent.drawn_slots, sent.drawn_positions, sent.drawn_tokens
        drawing = [*decode, *(row for row in chunks if row.draw is not None)]
        edited = self._draws.edits(drawing)
        bring = self._draws.bring(drawing, slots, result, 0, 0)
        _, positions, kv_slots = self._pieces.places[:, :own_tokens]
        write = self._entries.of(chunks, padded, positions, kv_slots, last, self._draws.drawn)

        def attend(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            attend_rows(layer, query[:padded], out[:padded])
            attend_chunks(layer, query[padded:], out[padded:])

        def forward() -> None:
            rows.gather()
            if self._limits.most_drafts:  # the host knows no positions of rows with drafts in flight
                new_positions[: len(decode)].copy_(inputs.lengths[: len(decode)])
            pairs = (inputs.tokens, sent.tokens), (inputs.positions, sent.positions), (inputs.kv_slots, sent.kv_slots)
            for pair, joined in zip(pairs, self._pieces.places[:, :num_tokens], strict=True):
                torch.cat(pair, out=joined)
            self._pieces.prefill(num_tokens, attend, last, sent.adapters)
            if draws.deferred:
                write(False)

        def choose() -> None:
            logits = self._decoder.last_logits(len(drawing))
            self._draws.draw(logits, slots, new_positions, edited)
            self._draws.take_in(slots, first_without=len(decode))
            if not draws.deferred:
                write(True)
            bring(logits)

        begun = self._queue.mark()
        draws.launch(forward, choose)
        return begun
