"""Drives a GPU's runner as a decode worker does, and the CPU's a step at a time, for tests here and on a GPU."""

from __future__ import annotations

from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.runner import CudaRunner
from baton.node.messages.control import SamplingSpec


class Ahead:
    """Sequences on one runner, as a decode worker drives it: each step is launched before the last one is read."""

    def __init__(self, late: CudaRunner) -> None:
        self.late = late
        self.known: dict[int, list[int]] = {}  # by slot
        self.computed: dict[int, int] = {}
        self.params: dict[int, SamplingSpec] = {}
        self.tables: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.in_flight: list = []

    def start(self, slot: int, prompt: list[int], blocks: list[int], **params) -> None:
        self.known[slot], self.computed[slot], self.tables[slot] = list(prompt), 0, blocks
        self.prompts[slot] = len(prompt)
        self.params[slot] = SamplingSpec(**({"max_tokens": 99, "temperature": 0.0} | params))

    def launch(self, slots: list[int], chunk: int = 100) -> None:
        rows, drawing = [], []
        for slot in slots:
            known, start = self.known[slot], self.computed[slot]
            pending = sum(slot in drawn for _, drawn in self.in_flight)
            expected = len(known) + pending
            end = min(start + chunk, expected)
            draw = None
            if end == expected:
                draw = Draw(self.params[slot], known, self.prompts[slot], expected - self.prompts[slot])
                drawing.append(slot)
            rows.append(Row(known[start:end], start, self.tables[slot], draw, slot))
            self.computed[slot] = end
        self.in_flight.append((self.late.launch(rows), drawing))
        if len(self.in_flight) > self.late.run_ahead:
            self.read()

    def read(self) -> None:
        launched, drawing = self.in_flight.pop(0)
        drawn = [entry.token_ids[0] for entry in launched.read() if entry is not None]
        for slot, token_id in zip(drawing, drawn, strict=True):
            self.known[slot].append(token_id)

    def generated(self, slot: int) -> list[int]:
        while self.in_flight:
            self.read()
        return self.known[slot][self.prompts[slot] :]


def one_after_the_other(plain: ModelRunner, prompt: list[int], blocks: list[int], count: int, **params) -> list[int]:
    known, row_start = list(prompt), 0
    sampling = SamplingSpec(**({"max_tokens": 99, "temperature": 0.0} | params))
    for _ in range(count):
        draw = Draw(sampling, known, len(prompt), len(known) - len(prompt))
        drawn = plain.step([Row(known[row_start:], row_start, blocks, draw)])[0]
        assert drawn is not None
        row_start = len(known)
        known.append(drawn.token_ids[0])
    return known[len(prompt) :]
