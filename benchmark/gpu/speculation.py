"""Times steps with drafts on the GPU at hand, in turns with the same steps without: random weights, random KV.

One JSON line a cell, first of the kernels that accept and propose alone. `oracle`: the client predicts what will be
drawn, by kernels whose results do not depend on the batch, so that the tokens are the same (`same_tokens`); `rewrite`:
every 15th token of the prediction is another. `useless`: no draft is ever right; none is proposed (0 drafts), or each
row always has so many. `step`: a step in which all rows have drafts, against one without.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch

from baton.benchmark.gpu.decode import blocks_for
from baton.benchmark.gpu.eagle import measure_eagle
from baton.benchmark.gpu.runners import load_shape, make_runner, random_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.kernels.triton.draft_inputs import NUM_DRAFTS
from baton.models.batch import Draw, Launched, Row
from baton.models.cuda.draft_budget import NONE_CERTAIN, BudgetChoice, DraftBudget, DraftResult
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.node.messages.control import SamplingSpec

CONTEXT, MOST_DRAFTS, CHANGED_EVERY = 1024, 12, 15
USELESS_STEPS, TURNS = 50, 3
CELLS = (
    ("oracle", 1, 12),
    ("useless", 1, 0),
    ("useless", 1, 7),
    ("useless", 32, 0),
    ("useless", 32, 3),
    ("step", 1, 7),
    ("step", 32, 3),
    ("rewrite", 1, 12),
    ("oracle", 32, 3),
    ("step", 8, 7),
    ("step", 32, 1),
    ("oracle", 8, 7),
    ("useless", 8, 7),
    ("rewrite", 8, 7),
    ("step", 1, 3),
    ("step", 8, 3),
)
"""What is measured, rows and drafts of each; the most important first, for a run that is cut off."""


class Streams:
    """Rows that continue from random contexts, as a decode worker drives them."""

    def __init__(self, runner: CudaRunner, rows: int, num_blocks: int, count: int, most: int) -> None:
        chance = random.Random(3)
        blocks = iter(chance.sample(range(num_blocks), rows * blocks_for(CONTEXT + count + MOST_DRAFTS)))
        self._tables = [list(islice(blocks, blocks_for(CONTEXT + count + MOST_DRAFTS))) for _ in range(rows)]
        self.known = [[chance.randrange(100_000) for _ in range(CONTEXT)] for _ in range(rows)]
        self.predictions: list[Sequence[int]] = [()] * rows
        self._runner, self._count, self._most = runner, count, most
        self._sampling = [
            SamplingSpec(max_tokens=count, temperature=0.7 * (row % 2), seed=row + 1) for row in range(rows)
        ]
        self.verified = self.accepted = self.steps = 0
        self.gpu_s: list[float] = []

    def run(self, force: int = 0, longest: int = 1 << 30) -> float:
        """Seconds until all rows have their tokens, or `longest` steps were read. force: drafts that each row has,
        whatever is proposed."""
        rows, began_at = range(len(self.known)), time.perf_counter()
        in_flight: list[tuple[list[int], Launched]] = []
        starts, given = [len(known) - 1 for known in self.known], True
        while self.steps < longest:
            live = [row for row in rows if len(self.known[row]) < CONTEXT + self._count]
            if not live:
                break
            if force:
                self._force(force)
            batch = []
            for row in live:
                known = self.known[row]
                draw = Draw(self._sampling[row], known, CONTEXT, len(known) - CONTEXT or 1, self.predictions[row])
                tokens = known[-1:] if given else ()
                batch.append(Row(tokens, starts[row], self._tables[row], draw, row, most_drafts=self._most))
                starts[row] += 1
            given = False
            in_flight.append((live, self._runner.launch(batch)))
            if len(in_flight) > self._runner.run_ahead:
                self._read(*in_flight.pop(0), starts)
        for each in in_flight:
            self._read(*each, starts)
        return time.perf_counter() - began_at

    def _read(self, live: Sequence[int], launched: Launched, starts: list[int]) -> None:
        self.steps += 1
        for row, drawn in zip(live, launched.read(), strict=True):
            assert drawn is not None, "all rows draw"
            self.known[row] += drawn.token_ids
            starts[row] += max(0, len(drawn.token_ids) - 1)
            self.verified += drawn.num_drafts
            self.accepted += max(0, len(drawn.token_ids) - 1)
        assert launched.device_time is not None, "a GPU measures its steps"
        self.gpu_s.append(launched.device_time.busy_s)

    def _force(self, count: int) -> None:
        assert self._runner.drafts is not None, "a runner with drafts"
        column = self._runner.drafts.kept.state[:, NUM_DRAFTS.value]

        def work() -> None:
            column.fill_(count)

        self._runner.queue.enqueue(work)

    @property
    def answers(self) -> list[list[int]]:
        return [known[CONTEXT : CONTEXT + self._count] for known in self.known]


class Fixed(DraftBudget):
    """A budget of always as many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__((tokens,), 1)
        self._tokens = tokens

    def choose(self, rows: Iterable[tuple[int, int]], certain: Mapping[int, int] = NONE_CERTAIN) -> BudgetChoice:
        return BudgetChoice(self._tokens, 0.0, tuple(slot for slot, _ in rows))

    def read(self, choice: BudgetChoice, results: Iterable[DraftResult], busy_s: float | None) -> None:
        """Learns nothing."""


class OffAndOn:
    """A runner without drafts and one with, over one pool."""

    def __init__(self, lines: JsonLines, shape: str, deterministic: bool, max_rows: int, count: int) -> None:
        config, weights = load_shape(lines, shape)
        self.num_blocks, self._lines, self._count = (
            max_rows * blocks_for(CONTEXT + count + MOST_DRAFTS) + 8,
            lines,
            count,
        )
        pool = random_pool(config, self.num_blocks)
        longest = CONTEXT + count + MOST_DRAFTS + 1
        self.about = {"shape": shape, "deterministic": deterministic}
        limits = StepLimits(max_rows, 2048, deterministic=deterministic)
        drafting = StepLimits(max_rows, 2048, deterministic=deterministic, most_drafts=MOST_DRAFTS)
        self.off = make_runner(lines, config, weights, limits, pool, longest)
        self.on = make_runner(lines, config, weights, drafting, pool, longest)
        self._answers: dict[int, list[list[int]]] = {}

    def streams(self, rows: int, most: int) -> Streams:
        return Streams(self.on if most else self.off, rows, self.num_blocks, self._count, most)

    def speedup(self, kind: str, rows: int, most: int) -> None:
        """Tokens a second with predictions and without; whether the tokens are the same."""
        plain = self.streams(rows, 0)
        plain_s = plain.run()
        drafted = self.streams(rows, most)
        for row, answer in enumerate(plain.answers):
            changed = [
                (token + 1) % 100_000 if kind == "rewrite" and place % CHANGED_EVERY == CHANGED_EVERY - 1 else token
                for place, token in enumerate(answer)
            ]
            drafted.predictions[row] = [*plain.known[row][CONTEXT - 4 : CONTEXT], *changed]
        drafted_s = drafted.run()
        same = sum(
            a == b for x, y in zip(plain.answers, drafted.answers, strict=True) for a, b in zip(x, y, strict=True)
        )
        total = rows * self._count
        self._lines.put(
            kind, **self.about, rows=rows, drafts=most, tokens=total, same_tokens=same, speedup=plain_s / drafted_s,
            tokens_s=total / drafted_s, off_tokens_s=total / plain_s, steps=drafted.steps, off_steps=plain.steps,
            verified=drafted.verified, accepted=drafted.accepted,
        )  # fmt: skip

    def useless(self, rows: int, drafts: int) -> None:
        """What drafts cost that are never right, in turns."""
        plain, drafted = [], []
        for _ in range(TURNS):
            off, on = self.streams(rows, 0), self.streams(rows, drafts or MOST_DRAFTS)
            plain.append(off.run(longest=USELESS_STEPS))
            if drafts:
                on.predictions = [misleading(known, drafts) for known in off.known]
            drafted.append(on.run(longest=USELESS_STEPS))
        self._lines.put(
            "useless", **self.about, rows=rows, drafts=drafts, verified=on.verified, accepted=on.accepted,
            cost=statistics.median(drafted) / statistics.median(plain),
            off_ms=statistics.median(plain) / USELESS_STEPS * 1e3,
        )  # fmt: skip

    def step(self, rows: int, most: int) -> None:
        """GPU time of a step of so many tokens; its drafts are wrong."""
        budget, self.on.budget = self.on.budget, Fixed(rows * (1 + most))
        try:
            plain, drafted = self.streams(rows, 0), self.streams(rows, most)
            plain.run(longest=25)
            drafted.run(most, longest=25)
        finally:
            self.on.budget = budget
        off_s, on_s = statistics.median(plain.gpu_s[5:]), statistics.median(drafted.gpu_s[5:])
        self._lines.put(
            "step", **self.about, rows=rows, drafts=most, ratio=on_s / off_s, off_ms=off_s * 1e3, on_ms=on_s * 1e3,
            verified=drafted.verified, accepted=drafted.accepted,
        )  # fmt: skip


def misleading(known: Sequence[int], drafts: int) -> list[int]:
    """A prediction with wrong tokens behind each five of the sequence, from the end of its context on."""
    parts = [known[end - 5 : end] for end in range(CONTEXT, len(known))]
    wrong = [(known[CONTEXT + place] + 1) % 100_000 for place in range(len(parts))]
    return [token for part, other in zip(parts, wrong, strict=True) for token in (*part, *[other] * drafts)]


def kernels(lines: JsonLines, rows: int, tokens: int) -> None:
    """Accept and propose alone."""
    queue = CudaQueue(0)
    slots = DraftSlots(queue, rows, rows, 7, tokens + 64)
    chance = random.Random(1)
    sampling = SamplingSpec(max_tokens=1 << 20, temperature=0.0)
    for slot in range(rows):
        history = [chance.randrange(100_000) for _ in range(tokens)]
        row = Row(history[-1:], tokens - 1, [0], Draw(sampling, history, tokens - 8, 8), slot, most_drafts=7)
        slots.begin(row, tokens + 64)
    slots.flush()
    of_rows = torch.arange(rows, dtype=torch.int32, device="cuda:0")
    drawn = torch.zeros(rows, dtype=torch.int32, device="cuda:0")
    graph = queue.capture(partial(slots.take_in, drawn, of_rows, first_without=0))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    queue.enqueue(begin.record)
    for _ in range(20):
        queue.enqueue(graph)
    queue.enqueue(end.record)
    end.synchronize()
    lines.put("accept_and_propose", rows=rows, tokens=tokens, us=begin.elapsed_time(end) / 20 * 1e3)


def main(argv: Sequence[str]) -> int:
    parser = new_parser("speculation", __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--count", type=int, default=384, help="tokens after each context")
    parser.add_argument("--cells", help="only these, comma separated, as KIND:ROWSxDRAFTS")
    parser.add_argument("--fast", action="store_true", help="also time kernels whose result depends on the batch")
    parser.add_argument("--speculate", choices=("ngram", "eagle"), default="ngram", help="what proposes drafts")
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    if options.speculate == "eagle":
        measure_eagle(lines, options.shape)
        return 0
    known = {f"{kind}:{rows}x{drafts}": (kind, rows, drafts) for kind, rows, drafts in CELLS}
    if options.cells and (strange := set(options.cells.split(",")) - set(known)):
        parser.error(f"--cells {', '.join(sorted(strange))}: must be of {', '.join(known)}")
    cells = [known[name] for name in options.cells.split(",")] if options.cells else CELLS
    kernels(lines, 64, 8192)
    for deterministic in (True, False) if options.fast else (True,):
        pair = OffAndOn(lines, options.shape, deterministic, max(rows for _, rows, _ in cells), options.count)
        for kind, rows, drafts in cells:
            if kind == "useless":
                pair.useless(rows, drafts)
            elif kind == "step":
                pair.step(rows, drafts)
            elif deterministic:
                pair.speedup(kind, rows, drafts)
        del pair
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
