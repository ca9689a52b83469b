"""What a runner on a GPU makes for the pool that it is bound to: the kinds of its steps, over tables of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from baton.models.cuda.chunk_steps import ChunkSteps
from baton.models.cuda.decode_steps import DecodeSteps
from baton.models.cuda.draft_graphs import DraftGraphs
from baton.models.cuda.mixed_steps import MixedSteps
from baton.models.cuda.prefill_pieces import PrefillPieces
from baton.models.weights import Progress


@dataclass(frozen=True, slots=True)
class PoolBinding:
    """Depends on how many blocks a sequence may have, and how large the pool's blocks are."""

    block_tokens: int
    decode: DecodeSteps
    chunks: ChunkSteps
    mixed: MixedSteps
    pieces: PrefillPieces
    after: DraftGraphs | None
    """What follows the draws of decode steps, where there are drafts."""

    def capture_all(self, on_progress: Progress) -> None:
        """In place of what was captured before; on_progress counts decode steps."""
        self.decode.capture_all(on_progress)
        if self.after is not None:
            self.after.capture_all()
        self.chunks.capture_all()
        self.pieces.capture_all()
