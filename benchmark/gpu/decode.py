"""Times decode steps of a served runner on the GPU at hand: random weights, random KV, every row continuing by itself.

One JSON line a cell: `step_ms` is the median wall time from one read to the next with `--run-ahead` steps under way, as
a worker runs them (launch, read, no scheduler); `gpu_ms` the median of the GPU's own time of the captured step and the
copies around it, launched one by one; `host_ms` what a launch takes the host. With `--breakdown` another line a cell,
once all are timed: what the time goes to, and the least that it could be (scripts/step_breakdown.py).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch

from baton.benchmark.gpu import step_breakdown
from baton.benchmark.gpu.gpu import BLOCK_TOKENS, chat_lengths, line, load_shape, make_runner, random_pool
from baton.models.batch import Draw, Row
from baton.models.cuda.runner import CudaRunner, Limits
from baton.node.messages.control import SamplingParams

CELLS = "1x1024,8x1024,16x1024,32x1024,64x1024,128x1024,256x1024,64x8192,1x32768,8x32768"
WARM_STEPS, STEPS = 5, 25
SLEEP_CYCLES = 4_000_000  # about 2 ms
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)


def contexts_of(cell: str) -> list[int]:
    """The tokens of each row, from "64x1024" or "64xchats"."""
    rows, _, tokens = cell.partition("x")
    return chat_lengths(int(rows)) if tokens == "chats" else [int(tokens)] * int(rows)


def blocks_for(context: int) -> int:
    return -(-(context + 1) // BLOCK_TOKENS)


class Cell:
    """A sequence a row, which reaches its number of tokens in the last step that is timed."""

    def __init__(self, contexts: Sequence[int], num_blocks: int, steps: int = WARM_STEPS + STEPS) -> None:
        blocks = iter(random.Random(0).sample(range(num_blocks), sum(map(blocks_for, contexts))))
        self._tables = [list(islice(blocks, blocks_for(context))) for context in contexts]
        self._starts = [context - steps for context in contexts]
        self._given = True

    def rows(self) -> list[Row]:
        """The next step's; the first brings its tokens, the others continue."""
        rows = [
            Row([1000 + slot] if self._given else [], start, table, Draw(GREEDY, (), 1, 1), slot)
            for slot, (start, table) in enumerate(zip(self._starts, self._tables, strict=True))
        ]
        self._starts = [start + 1 for start in self._starts]
        self._given = False
        return rows


def step_ms(runner: CudaRunner, cell: Cell) -> tuple[float, float]:
    """Median wall time between two reads, and of a launch."""
    flights, read_at, host = [], [], []
    for _ in range(WARM_STEPS + STEPS):
        rows = cell.rows()
        began_at = time.perf_counter()
        flights.append(runner.launch(rows))
        host.append(time.perf_counter() - began_at)
        if len(flights) > runner.run_ahead:
            flights.pop(0).read()
            read_at.append(time.perf_counter())
    for flight in flights:
        flight.read()
    gaps = [after - before for before, after in zip(read_at[WARM_STEPS:], read_at[WARM_STEPS + 1 :], strict=False)]
    return statistics.median(gaps) * 1e3, statistics.median(host[WARM_STEPS:]) * 1e3


def gpu_ms(runner: CudaRunner, cell: Cell) -> float:
    """Median GPU time of single steps, by events around the launch on the runner's own stream."""
    times = []
    for _ in range(WARM_STEPS + STEPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        runner.queue.enqueue(partial(torch.cuda._sleep, SLEEP_CYCLES))  # so that the GPU waits for no launch
        runner.queue.enqueue(begin.record)
        flight = runner.launch(cell.rows())
        runner.queue.enqueue(end.record)
        flight.read()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_STEPS:])


def step(runner: CudaRunner, cell: Cell) -> None:
    runner.launch(cell.rows()).read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--cells", default=CELLS, help="rows x tokens or rows x chats, comma separated")
    parser.add_argument("--run-ahead", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--breakdown", action="store_true", help="where the time of a step goes, beside its floors")
    options = parser.parse_args()
    cells = {name: contexts_of(name) for name in options.cells.split(",")}
    ceilings = step_breakdown.ceilings() if options.breakdown else None
    config, weights = load_shape(options.shape)
    pool = random_pool(config, max(sum(map(blocks_for, contexts)) for contexts in cells.values()) + 8)
    max_rows, longest = max(map(len, cells.values())), max(map(max, cells.values())) + 1
    limits = Limits(max_rows, 2048, options.run_ahead, options.deterministic)
    runner = make_runner(config, weights, limits, pool, longest)
    profiled: list[step_breakdown.Cell] = []
    for name, contexts in cells.items():
        values = {"rows": len(contexts), "context": max(contexts)} | ({"cell": name} if "chats" in name else {})
        wall, host = step_ms(runner, Cell(contexts, len(pool)))
        timed = gpu_ms(runner, Cell(contexts, len(pool)))
        line(
            what="decode_step",
            **values,
            step_ms=round(wall, 3),
            gpu_ms=round(timed, 3),
            host_ms=round(host, 3),
            run_ahead=options.run_ahead,
            deterministic=options.deterministic,
        )
        if ceilings is not None:
            floors = step_breakdown.floors_s(config, [Cell(contexts, len(pool), 1).rows()], ceilings)
            steps = Cell(contexts, len(pool), step_breakdown.PASSES)
            values = {"what": "decode_breakdown", **values}
            profiled.append(step_breakdown.Cell(values, partial(step, runner, steps), timed, floors))
    if ceilings is not None:
        step_breakdown.report(runner.queue, profiled)


if __name__ == "__main__":
    main()
