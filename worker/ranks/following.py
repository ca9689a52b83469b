"""Steps of ranks that each launch all of them: rank 0 tells of a step, the others launch the same one.

Every rank draws the same tokens by itself, so nothing comes back. The order of launches, masks and reads is rank 0's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from baton.models.batch import DeviceTime, Drawn, Launched, Row
from baton.models.cuda.draft_budget import BudgetChoice
from baton.node.messages.control import PromptLogprob
from baton.worker.parts import Runner
from baton.worker.ranks.device_records import StepBegun, decode_record, encode_masks, encode_step


class Follower:
    """Launches the steps that rank 0 tells of, and reads them when rank 0 has."""

    def __init__(self, launch: Callable[[Sequence[Row], BudgetChoice | None], Launched], run_ahead: int) -> None:
        self._launch, self._run_ahead = launch, run_ahead
        self._in_flight: deque[Launched] = deque()

    def take(self, record: bytes) -> None:
        found = decode_record(record)
        if isinstance(found, StepBegun):
            self._read_all_but(self._run_ahead)
            self._in_flight.append(self._launch(found.rows, found.choice))
        else:
            self._read_all_but(1)
            self._in_flight[-1].complete(found.array)

    def _read_all_but(self, count: int) -> None:
        while len(self._in_flight) > count:
            self._in_flight.popleft().read()


class ChoosingRunner(Runner, Protocol):
    """One on a GPU, which chooses how many drafts a step verifies by what steps took."""

    def choose(self, rows: Sequence[Row]) -> BudgetChoice | None: ...

    def launch_chosen(self, rows: Sequence[Row], choice: BudgetChoice | None) -> Launched: ...


class LeadingRunner:
    """Rank 0's: tells the others of a step before it launches it. A runner as worker.parts has it."""

    def __init__(self, runner: ChoosingRunner, tell: Callable[[bytes], None]) -> None:
        self._runner, self._tell = runner, tell
        self.config, self.run_ahead = runner.config, runner.run_ahead

    def launch(self, rows: Sequence[Row]) -> Launched:
        choice = self._runner.choose(rows)
        self._tell(encode_step(rows, choice))
        return LedStep(self._runner.launch_chosen(rows, choice), self._tell)


class LedStep:
    """A step of all ranks."""

    def __init__(self, step: Launched, tell: Callable[[bytes], None]) -> None:
        self._step, self._tell = step, tell

    @property
    def masked_drafts(self) -> Sequence[Sequence[int]]:
        return self._step.masked_drafts

    def complete(self, masks: np.ndarray) -> None:
        self._tell(encode_masks(masks))
        self._step.complete(masks)

    def read(self) -> list[Drawn | None]:
        return self._step.read()

    @property
    def device_time(self) -> DeviceTime | None:
        return self._step.device_time

    @property
    def prompt_logprobs(self) -> Mapping[int, tuple[PromptLogprob, ...]]:
        return self._step.prompt_logprobs
