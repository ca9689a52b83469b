"""Parts of prompts through a model's layers on a GPU: small steps captured, larger ones in pieces, the largest op by
op. A captured step has one shape, and parts of prompts are padded to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from baton.models.batch import Draw, Row
from baton.models.cuda.chunk_upload import ChunkUpload, SentChunks
from baton.models.cuda.chunks import ChunkShape, lay_out, with_tokens
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.prefill_pieces import PrefillPieces
from baton.models.cuda.queue import Queue, Work
from baton.models.cuda.step_decoder import StepDecoder
from baton.node.messages.control import SamplingSpec

CHUNK_SIZES, CHUNK_SEQUENCES = ((128, 1), (256, 1), (512, 1), (1024, 900)), 4
"""Parts of prompts of up to so many tokens, of up to so many sequences, are captured as well, and run so from the
second number of tokens on: with fewer the rest, which is computed too, takes longer than launching does."""


@dataclass(frozen=True, slots=True)
class CapturedChunks:
    """Parts of prompts as one launch, in one shape."""

    shape: ChunkShape
    launch: Work


class ChunkForward:
    """Of one decoder over one pool."""

    def __init__(
        self,
        queue: Queue,
        decoder: StepDecoder,
        limits: StepLimits,
        upload: ChunkUpload,
        pieces: PrefillPieces,
        captured_width: int,
    ) -> None:
        """captured_width: blocks of a sequence of a captured step at most; 0: none is captured."""
        self._queue, self._decoder, self._limits, self._upload = queue, decoder, limits, upload
        self._pieces, self._captured_width = pieces, captured_width
        self._captured: list[CapturedChunks] = []  # smallest first
        self._adapted: list[CapturedChunks] = []  # those with adapters

    def capture_all(self) -> None:
        """In place of what was captured before."""
        if self._decoder.captured:
            self._captured = list(self._capture(None))
        if self._limits.adapter_slots:
            self._adapted = list(self._capture(0))

    def prepare(self, rows: Sequence[Row]) -> tuple[SentChunks, Work]:
        """Sends the rows, padded, with what computes them: StepDecoder.prefill."""
        arrays = self._upload.lay_out(rows)
        steps = self._captured if all(row.adapter is None for row in rows) else self._adapted
        captured = next((step for step in steps if step.shape.holds(arrays)), None)
        if captured is not None:
            arrays = captured.shape.padded(arrays, self._upload.slots.padding)
            return self._upload.send(arrays, rows, len(arrays.tokens)), captured.launch
        size = self._pieces.size_for(len(arrays.tokens))
        if size is not None:
            sent = self._upload.send(with_tokens(arrays, size), rows, size)
            return sent, self._in_pieces(sent)
        sent = self._upload.send(arrays, rows, len(arrays.tokens))
        return sent, self._whole(sent)

    def _whole(self, sent: SentChunks) -> Work:
        """Op by op."""
        tokens = sent.tokens, sent.positions, sent.kv_slots
        return partial(self._decoder.prefill, *tokens, self._upload.attend(sent), sent.drawn_tokens, sent.adapters)

    def _in_pieces(self, sent: SentChunks) -> Work:
        """Of a size of theirs."""
        attend, num_tokens = self._upload.attend(sent), len(sent.tokens)

        def work() -> None:
            for place, given in zip(self._pieces.places, (sent.tokens, sent.positions, sent.kv_slots), strict=True):
                place[:num_tokens].copy_(given)
            self._pieces.prefill(num_tokens, attend, sent.drawn_tokens, sent.adapters)

        return work

    def _capture(self, adapter: int | None) -> Iterator[CapturedChunks]:
        """Small steps, whose launches would take the host longer than the GPU; for rows with adapters if one is
        given."""
        upload, width = self._upload, self._captured_width
        draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 1, 0)
        row = Row([0], 0, [0], draw, adapter=adapter)
        for tokens, least in CHUNK_SIZES if width else ():
            items = (-(-tokens // upload.tile) + CHUNK_SEQUENCES) * upload.num_heads
            shape = ChunkShape(tokens, least, CHUNK_SEQUENCES, width, items)
            if self._limits.max_tokens >= tokens and self._limits.max_rows >= CHUNK_SEQUENCES:
                one = lay_out([row], upload.block_tokens, upload.num_heads, upload.tile)
                sent = upload.send(shape.padded(one, upload.slots.padding), [row], tokens)
                yield CapturedChunks(shape, self._queue.capture(self._whole(sent)))
