"""A step that was launched on a device: when its result is there, what it brings back to the host, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from baton.kernels.triton.drafts import FIRST_PLACE, IDS, NUM_DRAWN, NUM_NEXT, NUM_VERIFIED, WAS_FROM
from baton.kernels.triton.logprobs import MOST, LogprobRows
from baton.kernels.triton.prompt_logprobs import PromptLogprobRows
from baton.models.batch import DeviceTime, DraftSource, Drawn
from baton.models.cuda.draft_budget import DraftResult
from baton.models.cuda.queue import Queue, QueueMark
from baton.node.errors import InvariantBroken
from baton.node.messages.control import Logprob, PromptLogprob

NUM_TOP = MOST.value
SOURCES: tuple[DraftSource, ...] = ("history", "prediction", "answers", "eagle", "grammar")
"""By the number that kernels.triton.draft_inputs gives them."""


class ScoredPart(NamedTuple):
    """Row number `row` of a step has `size` results from `first` on, with `num_top` likeliest tokens each."""

    row: int
    first: int
    size: int
    num_top: int


class ScoreBuffers:
    """Log probabilities of up to `size` tokens of prompts."""

    def __init__(self, queue: Queue, size: int) -> None:
        self._values = queue.host_buffer(size).view(torch.float32)
        self._ranks = queue.host_buffer(size)
        self._tops = queue.host_buffer(size * NUM_TOP).view(torch.float32).view(size, NUM_TOP)
        self._top_ids = queue.host_buffer(size * NUM_TOP).view(size, NUM_TOP)

    def take(self, count: int, found: PromptLogprobRows) -> None:
        self._values[:count].copy_(found.values[:count], non_blocking=True)
        self._ranks[:count].copy_(found.ranks[:count], non_blocking=True)
        self._tops[:count].copy_(found.top[:count], non_blocking=True)
        self._top_ids[:count].copy_(found.top_ids[:count], non_blocking=True)

    def read(self, part: ScoredPart) -> tuple[PromptLogprob, ...]:
        places = slice(part.first, part.first + part.size)
        ids, values = self._top_ids[places, : part.num_top].tolist(), self._tops[places, : part.num_top].tolist()
        own = zip(self._values[places].tolist(), self._ranks[places].tolist(), ids, values, strict=True)
        return tuple(PromptLogprob(value, rank, tuple(zip(i, v, strict=True))) for value, rank, i, v in own)


class StepResult:
    """Tokens, and where asked for log probabilities, of up to max_rows rows. Filled by work that was enqueued."""

    def __init__(self, queue: Queue, max_rows: int, most_drafts: int = 0, drafted_tokens: int = 0) -> None:
        """most_drafts: above 0, each row has the tokens that it accepted, see kernels.triton.drafts; drafted_tokens: of
        a step with them at most."""
        self._queue = queue
        width = IDS.value + most_drafts + 1
        self._accepted = queue.host_buffer(max_rows * width).view(max_rows, width) if most_drafts else None
        self._offered = queue.host_buffer(max_rows * (1 + most_drafts)).view(max_rows, 1 + most_drafts)
        self._scores: ScoreBuffers | None = None
        self._tokens = queue.host_buffer(max_rows)
        places = max_rows + drafted_tokens
        self._logprobs = queue.host_buffer(places).view(torch.float32)
        self._tops = queue.host_buffer(places * NUM_TOP).view(torch.float32).view(places, NUM_TOP)
        self._top_ids = queue.host_buffer(places * NUM_TOP).view(places, NUM_TOP)
        self._chunk_rows = self.chunk_places = 0

    def take_tokens(self, first: int, drawn: torch.Tensor) -> None:
        """Copies tokens [n] to the places from `first` on, without waiting."""
        self._tokens[first : first + len(drawn)].copy_(drawn, non_blocking=True)

    def take_accepted(self, first: int, accepted: torch.Tensor) -> None:
        """The same for what rows accepted, int32 [n, width]."""
        assert self._accepted is not None, "a runner without drafts"
        self._accepted[first : first + len(accepted)].copy_(accepted, non_blocking=True)

    def take_offered(self, offered: torch.Tensor) -> None:
        """The same for the drafts that the step may verify of some rows, int32 [n, 1 + most drafts]: how many, and they
        themselves."""
        self._offered[: len(offered)].copy_(offered, non_blocking=True)

    def offered(self, num_rows: int) -> list[list[int]]:
        """Of the first rows of these."""
        return [drafts[:count] for count, *drafts in self._offered[:num_rows].tolist()]

    def place_chunks(self, first: int, place: int) -> None:
        """Rows from number `first` on have log probabilities at places from `place` on, behind all tokens of others."""
        self._chunk_rows, self.chunk_places = first, place

    def take_logprobs(self, first: int, count: int, found: LogprobRows) -> None:
        """The same for log probabilities of the first `count` tokens of a draw."""
        places = slice(first, first + count)
        self._logprobs[places].copy_(found.drawn[:count], non_blocking=True)
        self._tops[places].copy_(found.top[:count], non_blocking=True)
        self._top_ids[places].copy_(found.top_ids[:count], non_blocking=True)

    def take_scores(self, count: int, found: PromptLogprobRows) -> None:
        """The same for log probabilities of `count` tokens of prompts."""
        if self._scores is None:  # few steps have any
            self._scores = ScoreBuffers(self._queue, len(found.values))
        self._scores.take(count, found)

    def scores(self, span: ScoredPart) -> tuple[PromptLogprob, ...]:
        assert self._scores is not None, "a step without log probabilities of prompts"
        return self._scores.read(span)

    def read(self, num_tops: list[int | None]) -> list[Drawn]:
        """The first rows; num_tops says how many likeliest tokens each names, None: no logprob."""
        if self._accepted is not None:
            return [
                Drawn(
                    tuple(line[IDS.value : IDS.value + line[NUM_DRAWN.value]]),
                    self._logprobs_of(self._places_of(row, line), num_tops[row]),
                    line[NUM_VERIFIED.value],
                    SOURCES[line[WAS_FROM.value]],
                )
                for row, line in enumerate(self._accepted[: len(num_tops)].tolist())
            ]
        tokens = self._tokens[: len(num_tops)].tolist()
        return [Drawn((token,), self._logprobs_of((row,), num_tops[row])) for row, token in enumerate(tokens)]

    def drafts(self, num_rows: int) -> list[DraftResult]:
        """Of the first rows."""
        assert self._accepted is not None, "a runner without drafts"
        return [
            DraftResult(
                num_drawn=line[NUM_DRAWN.value],
                num_verified=line[NUM_VERIFIED.value],
                num_next=line[NUM_NEXT.value],
                forced=SOURCES[line[WAS_FROM.value]] == "grammar",
            )
            for line in self._accepted[:num_rows].tolist()
        ]

    def _places_of(self, row: int, line: Sequence[int]) -> Sequence[int]:
        """Places of the tokens that a row with this result has drawn."""
        own = row if row < self._chunk_rows else row - self._chunk_rows + self.chunk_places
        first = line[FIRST_PLACE.value]
        return (own, *range(first, first + line[NUM_DRAWN.value] - 1)) if line[NUM_DRAWN.value] else ()

    def _logprobs_of(self, places: Sequence[int], num_top: int | None) -> tuple[Logprob, ...]:
        if num_top is None:
            return ()
        at = list(places)
        ids, values = self._top_ids[at, :num_top].tolist(), self._tops[at, :num_top].tolist()
        drawn = zip(self._logprobs[at].tolist(), ids, values, strict=True)
        return tuple(Logprob(value, tuple(zip(i, v, strict=True))) for value, i, v in drawn)


@dataclass(frozen=True, slots=True)
class StepMarks:
    """The end of the step before, and this step's begin and end; of a step with masks, where its logits are computed,
    and where the masks have come."""

    before: QueueMark
    begun: QueueMark
    ended: QueueMark
    computed: QueueMark | None = None
    masked: QueueMark | None = None

    @property
    def device_time(self) -> DeviceTime:
        waited_s = self.masked.since(self.computed) if self.masked is not None and self.computed is not None else 0.0
        return DeviceTime(self.ended.since(self.begun), self.begun.since(self.before), waited_s)


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way; its result is there once its end has passed."""

    marks: StepMarks | None
    """None: it waits for masks."""
    result: StepResult
    drawing: list[int]
    num_tops: list[int | None]
    num_rows: int
    give_back: Callable[[StepResult], None]
    draw_masked: Callable[[np.ndarray], StepMarks]
    scored: tuple[ScoredPart, ...] = ()
    learn: Callable[[StepResult, DeviceTime], None] | None = None
    """Called by `read`, once."""
    check: Callable[[], None] | None = None
    """Called by `read`, once; raises where the step has no result."""
    prompt_logprobs: dict[int, tuple[PromptLogprob, ...]] = field(default_factory=dict)
    """Filled by `read`."""
    offered: Callable[[], Sequence[Sequence[int]]] = tuple
    """The drafts of masked rows, once all steps before it were read."""

    @property
    def masked_drafts(self) -> Sequence[Sequence[int]]:
        return self.offered()

    @property
    def device_time(self) -> DeviceTime | None:
        return self._ended.device_time

    def complete(self, masks: np.ndarray) -> None:
        if self.marks is not None:
            raise InvariantBroken("a step without masked draws, or one that has its masks")
        self.marks = self.draw_masked(masks)

    def read(self) -> list[Drawn | None]:
        self._ended.ended.wait()
        if self.check is not None:
            self.check()
        drawn: list[Drawn | None] = [None] * self.num_rows
        for index, entry in zip(self.drawing, self.result.read(self.num_tops), strict=True):
            drawn[index] = entry
        self.prompt_logprobs.update({part.row: self.result.scores(part) for part in self.scored})
        if self.learn is not None:
            self.learn(self.result, self._ended.device_time)
        self.give_back(self.result)
        return drawn

    @property
    def _ended(self) -> StepMarks:
        if self.marks is None:
            raise InvariantBroken("a step with masked draws was not completed")
        return self.marks
