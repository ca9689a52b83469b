"""A step that was launched on a device: when its result is there, and what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.models.batch import DeviceTime, Drawn
from baton.models.cuda.queue import Mark
from baton.models.cuda.results import StepResult


@dataclass(frozen=True, slots=True)
class Marks:
    """The end of the step before, and this step's begin and end."""

    before: Mark
    begun: Mark
    ended: Mark

    @property
    def device_time(self) -> DeviceTime:
        return DeviceTime(self.ended.since(self.begun), self.begun.since(self.before))


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step on its way; its result is there once its end has passed."""

    marks: Marks
    result: StepResult
    drawing: list[int]
    num_tops: list[int | None]
    num_rows: int
    give_back: Callable[[StepResult], None]

    @property
    def device_time(self) -> DeviceTime | None:
        return self.marks.device_time

    def read(self) -> list[Drawn | None]:
        self.marks.ended.wait()
        drawn: list[Drawn | None] = [None] * self.num_rows
        for index, entry in zip(self.drawing, self.result.read(self.num_tops), strict=True):
            drawn[index] = entry
        self.give_back(self.result)
        return drawn
