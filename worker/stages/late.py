"""Stages whose steps run on a GPU beside the host: a step is launched when it comes, and sent on by a thread once the
GPU has computed it. So launching waits for nothing, and a GPU begins its next step when it ends one. Residuals lie in
memory that neighbours share (`residual_memory`); messages name the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import NoReturn, Protocol

import torch

from baton.models.batch import Done, Launched, Row
from baton.models.config import ModelConfig
from baton.node.errors import InvariantBroken, PeerLost
from baton.worker.stages.links import StepLink
from baton.worker.stages.messages import (
    SlotFill,
    StepDrawn,
    decode_masks,
    decode_rows,
    encode_drawn,
    encode_rows,
)
from baton.worker.stages.runner import PipelinedStep
from baton.worker.stages.work import Entering, is_masked

Message = tuple[bytes, bytes]
"""A record and, of a step that goes on, the number of its slot."""


class AdvancesSteps(Protocol):
    """models.cuda.stage.AdvancingStage."""

    @property
    def config(self) -> ModelConfig: ...

    run_ahead: int

    def advance(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> LeftStep: ...


class LeftStep(Protocol):
    """models.cuda.residuals.LeftResidual."""

    @property
    def slot(self) -> int: ...

    def wait(self) -> torch.Tensor: ...


class DrawsSteps(Protocol):
    """models.cuda.runner.CudaRunner of the last stage."""

    def launch(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> Launched: ...


class Leaving:
    """Sends messages over a link in the order in which they are put, from a thread that waits for each."""

    def __init__(self, link: StepLink, on_begin: Callable[[], None], on_end: Callable[[], None]) -> None:
        """on_begin: called in the thread, first; on_end: last, when nothing is sent any more, since the link or a step
        is lost."""
        self._link, self._on_begin, self._on_end = link, on_begin, on_end
        self._messages: SimpleQueue[Callable[[], Message]] = SimpleQueue()
        Thread(target=self._send, name="leaving", daemon=True).start()

    def put(self, message: Callable[[], Message]) -> None:
        """What is called for the message may wait for a GPU."""
        self._messages.put(message)

    def _send(self) -> None:
        try:
            self._on_begin()
            with suppress(PeerLost):  # which what receives at the same link says
                while True:
                    self._link.send(*self._messages.get()())
        finally:
            self._on_end()


class LatePipelineRunner:
    """worker.parts.Runner over the stages, in the process of the first. One thread makes all calls."""

    def __init__(self, first: AdvancesSteps, following: StepLink, last: StepLink, on_begin: Callable[[], None]) -> None:
        """following: to the second stage; last: to the last one; on_begin: of the thread that waits for steps."""
        self.config, self.run_ahead = first.config, first.run_ahead
        self._first, self._last = first, last
        self._leaving = Leaving(following, on_begin, following.shut)

    def launch(self, rows: Sequence[Row]) -> Launched:
        if not rows:
            return Done([])
        self._leaving.put(partial(_advanced, encode_rows(rows), self._first.advance(rows)))
        return PipelinedStep(self._last, len(rows))


class EnteringSteps:
    """Steps in order, each with its residual in a slot of the memory that the stage before writes."""

    def __init__(self, entering: Entering, slots: Sequence[torch.Tensor]) -> None:
        self._entering, self._slots = entering, slots

    def next(self) -> tuple[bytes, Sequence[Row], torch.Tensor]:
        """The record, its rows, and what they enter with, [N, hidden]. PeerLost once the link has ended."""
        record, slot = self._entering.receive()
        rows = decode_rows(record)
        if isinstance(rows, SlotFill):
            raise InvariantBroken(f"slot {rows.slot} is filled, where there is none")
        return record, rows, self._slots[slot[0]][: sum(len(row.token_ids) for row in rows)]


def advance_late(stage: AdvancesSteps, entering: EnteringSteps, leaving: Leaving) -> NoReturn:
    """Of a stage between the first and the last. Ends with PeerLost."""
    while True:
        record, rows, residual = entering.next()
        leaving.put(partial(_advanced, record, stage.advance(rows, residual)))


def draw_late(stage: DrawsSteps, entering: EnteringSteps, leaving: Leaving, first: StepLink) -> NoReturn:
    """Of the last stage; first: where masks come from. Ends with PeerLost."""
    while True:
        _, rows, residual = entering.next()
        launched = stage.launch(rows, residual)
        if is_masked(rows):  # no step is launched behind it, until all before it were read
            launched.complete(decode_masks(*first.receive()))
        leaving.put(partial(_drawn, launched))


def _advanced(record: bytes, left: LeftStep) -> Message:
    left.wait()
    return record, bytes([left.slot])


def _drawn(launched: Launched) -> Message:
    drawn = launched.read()
    return encode_drawn(StepDrawn(drawn, dict(launched.prompt_logprobs))), b""
