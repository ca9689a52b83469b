"""Drives a GPU's runner as a decode worker does, and the CPU's a step at a time, for tests here and on a GPU."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, takewhile

import numpy as np

from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.draft_budget import BudgetChoice
from baton.models.cuda.runner import CudaRunner
from baton.node.messages.control import Grammar, Logprob, SamplingSpec

GRAMMAR = Grammar(text="start: /.*/", end_ids=(0,))
"""Marks masked draws; `mask_after` stands in for what it allows."""


NOTHING_FORCED: Mapping[int, int] = {}


def mask_after(known: Sequence[int], vocab_size: int, forced: Mapping[int, int] = NOTHING_FORCED) -> np.ndarray:
    """A third of the tokens, by what came before, or the one that is forced at this place; int32 words."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    if len(known) in forced:
        bits[forced[len(known)]] = 1
    else:
        bits[(sum(known) % 3) : vocab_size : 3] = 1
    return np.packbits(bits, bitorder="little").view("<u4").view(np.int32)


def always_draft(runner: CudaRunner) -> None:
    """Let every row have places for all its drafts, as far as there are graphs, whatever steps take on this machine:
    drafts of a small model never pay."""
    sizes = runner.budget.sizes

    def choose(rows: Iterable[tuple[int, int]], certain: Mapping[int, int] = NOTHING_FORCED) -> BudgetChoice:
        given = list(rows)
        fits = bisect_left(sizes, sum(1 + most for _, most in given), hi=len(sizes) - 1)
        return BudgetChoice(sizes[fits], 0.0, tuple(slot for slot, _ in given))

    runner.budget.choose = choose  # type: ignore[method-assign]


class Ahead:
    """Sequences on one runner, as a decode worker drives it: each step is launched before the last one is read."""

    def __init__(self, late: CudaRunner | ModelRunner, most_drafts: int = 0) -> None:
        self.late, self.most_drafts = late, most_drafts
        self.predictions: dict[int, list[int]] = {}
        self.forced: Mapping[int, int] = {}
        """Tokens by their places, in sequences with masks."""
        self.sources: Counter[str] = Counter()
        """Accepted drafts."""
        self.num_steps = self.num_accepted = self.num_verified = 0
        self.known: dict[int, list[int]] = {}  # by slot
        self.logprobs: dict[int, list[Logprob]] = {}
        self.computed: dict[int, int] = {}
        self.params: dict[int, SamplingSpec] = {}
        self.tables: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.in_flight: list = []
        self.adapters: dict[int, int] = {}
        """Slots of the runner's adapters, by slot of the sequence."""

    def start(self, slot: int, prompt: list[int], blocks: list[int], **params) -> None:
        self.known[slot], self.computed[slot], self.tables[slot] = list(prompt), 0, blocks
        self.prompts[slot], self.logprobs[slot] = len(prompt), []
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
                prediction = self.predictions.get(slot, ())
                draw = Draw(self.params[slot], known, self.prompts[slot], expected - self.prompts[slot], prediction)
                if draw.is_masked:
                    places = takewhile(self.forced.__contains__, count(len(known)))
                    draw = draw._replace(forced=[self.forced[place] for place in places])
                drawing.append(slot)
            drafts = self.most_drafts if draw is not None and end - start == 1 and draw.num_generated else 0
            adapter, following = self.adapters.get(slot), known[end] if end < len(known) else None
            row = Row(known[start:end], start, self.tables[slot], draw, slot, None, drafts, adapter, following)
            rows.append(row)
            self.computed[slot] = end
        launched = self.late.launch(rows)
        masked = [row.slot for row in rows if row.draw is not None and row.draw.is_masked]
        while masked and self.in_flight:
            self.read()
        if masked:
            launched.complete(np.stack(list(self._masks(masked, launched.masked_drafts))))
        self.in_flight.append((launched, drawing))
        if len(self.in_flight) > self.late.run_ahead:
            self.read()

    def _masks(self, slots: list[int], drafts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        for slot, own in zip(slots, drafts or [()] * len(slots), strict=True):
            for number in range(len(own) + 1):
                known = [*self.known[slot], *own[:number]]
                yield mask_after(known, self.late.config.vocab_size, self.forced)

    def read(self) -> None:
        launched, drawing = self.in_flight.pop(0)
        self.num_steps += 1
        drawn = [entry for entry in launched.read() if entry is not None]
        for slot, entry in zip(drawing, drawn, strict=True):
            self.known[slot] += entry.token_ids
            self.logprobs[slot] += entry.logprobs
            self.computed[slot] += max(0, len(entry.token_ids) - 1)
            self.num_accepted += max(0, len(entry.token_ids) - 1)
            self.sources[entry.source] += max(0, len(entry.token_ids) - 1)
            self.num_verified += entry.num_drafts

    def generated(self, slot: int) -> list[int]:
        while self.in_flight:
            self.read()
        return self.known[slot][self.prompts[slot] :]


def check_drafts(late: CudaRunner, plain: ModelRunner, prompt: list[int], blocks: list[int], count: int) -> None:
    """Both runners verify drafts of one sequence, of which every fourth is wrong: tokens are those without."""
    right, vocab_size = one_after_the_other(plain, prompt, blocks, count), plain.config.vocab_size
    predicted = [(token + (number % 4 == 3)) % vocab_size for number, token in enumerate(right)]
    for runner in (late, plain):
        ahead = Ahead(runner, most_drafts=3)
        ahead.predictions[0] = [*prompt, *predicted]
        ahead.start(0, prompt, blocks)
        while len(ahead.known[0]) < len(prompt) + count:
            ahead.launch([0])
        assert ahead.generated(0)[:count] == right
        assert 0 < ahead.num_accepted < ahead.num_verified


def one_after_the_other(
    plain: ModelRunner,
    prompt: list[int],
    blocks: list[int],
    count: int,
    forced: Mapping[int, int] = NOTHING_FORCED,
    **params,
) -> list[int]:
    known, row_start = list(prompt), 0
    sampling = SamplingSpec(**({"max_tokens": 99, "temperature": 0.0} | params))
    for _ in range(count):
        draw = Draw(sampling, known, len(prompt), len(known) - len(prompt))
        launched = plain.launch([Row(known[row_start:], row_start, blocks, draw)])
        if draw.is_masked:
            launched.complete(mask_after(known, plain.config.vocab_size, forced)[None])
        drawn = launched.read()[0]
        assert drawn is not None
        row_start = len(known)
        known.append(drawn.token_ids[0])
    return known[len(prompt) :]
