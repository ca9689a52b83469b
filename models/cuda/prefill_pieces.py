"""Steps with parts of prompts as captured pieces: what depends on no draw, cut where each layer attends.

What attention launches depends on the sequences of a step, all else on its number of tokens alone. So one ladder of
sizes serves parts of prompts of any sequences, with rows that decode before them or without, and a step is padded to
the next size. The host then launches a piece, attention, a piece, and the last layer op by op, since that depends on
what is drawn; a stage before the last draws nothing, and has all of its layers in pieces.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

from baton.kernels.triton.adapter_rows import AdapterRows
from baton.models.batch import Row
from baton.models.cuda.attention import Attend
from baton.models.cuda.chunk_upload import ChunkUpload
from baton.models.cuda.chunks import with_tokens
from baton.models.cuda.decoder import DeviceDecoder, EndPrefill
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import Hole, Queue
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.cuda.step_ops import Step

SMALLEST = 16, 32
SMALL, SMALL_STEP = 1024, 64
LARGE, LARGE_STEP = 2048, 128
"""Sizes, and tokens up to which every multiple of a step is one. Products have tiles of 128 tokens, so that padding
costs little; beyond, launching an 8B model's step takes the host less than the GPU."""


def piece_sizes(max_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens that are captured, rising."""
    small, large = range(SMALL_STEP, SMALL + 1, SMALL_STEP), range(SMALL + LARGE_STEP, LARGE + 1, LARGE_STEP)
    return tuple(size for size in (*SMALLEST, *small, *large) if size <= max_tokens)


class PrefillPieces:
    """Of one decoder over one pool."""

    def __init__(self, queue: Queue, decoder: StepDecoder, limits: StepLimits, upload: ChunkUpload) -> None:
        self._queue, self._decoder, self._limits, self._upload = queue, decoder, limits, upload
        self.places = torch.empty(3, limits.step_tokens, dtype=torch.int32, device=queue.device)
        """Tokens, positions and KV slots of a step."""
        queue.enqueue(self._clear)  # elsewhere it might run behind the first step, which reads them as they are
        self._sizes: tuple[int, ...] = ()
        self._pieces: dict[tuple[int, bool], Callable[[Hole], EndPrefill]] = {}

    def _clear(self) -> None:
        self.places.zero_()

    def capture_all(self) -> None:
        """In place of what was captured before."""
        if not isinstance(self._decoder, DeviceDecoder):
            return
        self._sizes = piece_sizes(self._limits.step_tokens)
        for size in reversed(self._sizes):  # the memory of the largest serves the others
            for adapter in (None, 0) if self._limits.adapter_slots else (None,):
                self._pieces[size, adapter is not None] = self._capture(self._decoder, size, adapter)

    def size_for(self, num_tokens: int) -> int | None:
        """Tokens to which a step of so many is padded; None: it does not run in pieces."""
        at = bisect_left(self._sizes, num_tokens)
        return self._sizes[at] if at < len(self._sizes) else None

    def prefill(self, num_tokens: int, attend: Attend, drawn: torch.Tensor, adapters: AdapterRows | None) -> None:
        """StepDecoder.prefill of so many tokens in `places`, in pieces if it is of a size of theirs."""
        tokens, positions, kv_slots = self.places[:, :num_tokens]
        pieces = self._pieces.get((num_tokens, adapters is not None))
        if pieces is None:
            self._decoder.prefill(tokens, positions, kv_slots, attend, drawn, adapters)
        else:
            pieces(attend)(Step(tokens, positions, kv_slots, attend, drawn, adapters=adapters))

    def _capture(self, decoder: DeviceDecoder, size: int, adapter: int | None) -> Callable[[Hole], EndPrefill]:
        """For rows with adapters if one is given."""
        tokens, positions, kv_slots = self.places[:, :size]
        row = Row([0], 0, [0], None, adapter=adapter)
        arrays = with_tokens(self._upload.lay_out([row]), size)
        adapters = self._upload.send(arrays, [row], size).adapters

        def begin(attend: Hole) -> EndPrefill:
            return decoder.begin(Step(tokens, positions, kv_slots, attend, adapters=adapters))

        return self._queue.capture_around(begin)
