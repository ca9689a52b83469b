"""What a stage after the first does with the steps that come in, one after the other, until its links end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Protocol

import torch

from baton.models.batch import Launched, Row
from baton.node.errors import InvariantBroken, PeerLost
from baton.worker.stages.links import StepLink
from baton.worker.stages.messages import (
    SlotFill,
    StepDrawn,
    bytes_of,
    decode_masks,
    decode_rows,
    encode_drawn,
    encode_rows,
    residual_of,
)


class StageRunner(Protocol):
    """models.cpu.runner.ModelRunner of a stage."""

    dtype: torch.dtype

    def advance(self, rows: Sequence[Row], entering: torch.Tensor | None) -> torch.Tensor: ...

    def launch(self, rows: Sequence[Row], entering: torch.Tensor | None) -> Launched: ...


class Entering:
    """Takes steps off the link while others are computed, so that the stage before goes on with the next."""

    def __init__(self, link: StepLink, most: int) -> None:
        """most: steps that can be in flight."""
        self._link = link
        self._steps: Queue[tuple[bytes, bytearray] | PeerLost] = Queue(most + 1)
        threading.Thread(target=self._take, name="entering", daemon=True).start()

    def receive(self) -> tuple[bytes, bytearray]:
        """The next one; PeerLost once the link has ended."""
        step = self._steps.get()
        if isinstance(step, PeerLost):
            raise step
        return step

    def _take(self) -> None:
        while True:
            try:
                self._steps.put(self._link.receive())
            except PeerLost as error:
                self._steps.put(error)
                return


def no_adapters(record: SlotFill) -> None:
    """Of stages that take none."""
    raise InvariantBroken(f"slot {record.slot} is filled, where there is none")


def work(
    runner: StageRunner,
    entering: Entering,
    leaving: StepLink,
    is_last: bool,
    on_computed: Callable[[Sequence[Row]], None] = lambda rows: None,
    on_filled: Callable[[SlotFill], None] = no_adapters,
) -> None:
    """Ends with PeerLost. on_computed: called for each step before it leaves; on_filled: for each slot of an adapter
    that the first stage has filled."""
    while True:
        record, data = entering.receive()
        rows = decode_rows(record)
        if isinstance(rows, SlotFill):
            on_filled(rows)
            if not is_last:
                leaving.send(record)
            continue
        residual = residual_of(data, runner.dtype, sum(len(row.token_ids) for row in rows))
        if is_last:
            drawn = _drawn(runner.launch(rows, residual), rows, leaving)
            on_computed(rows)
            leaving.send(encode_drawn(drawn))
        else:
            left = runner.advance(rows, residual)
            on_computed(rows)
            leaving.send(encode_rows(rows), bytes_of(left))


def is_masked(rows: Sequence[Row]) -> bool:
    """Whether draws of the step need masks, which come from the first stage."""
    return any(row.draw is not None and row.draw.is_masked for row in rows)


def _drawn(launched: Launched, rows: Sequence[Row], first: StepLink) -> StepDrawn:
    """Of a step in the last stage, which waits for masks from the first where draws need some."""
    if is_masked(rows):
        launched.complete(decode_masks(*first.receive()))
    drawn = launched.read()
    return StepDrawn(drawn, dict(launched.prompt_logprobs))
