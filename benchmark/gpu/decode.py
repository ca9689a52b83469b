"""Times decode steps of a served runner on the GPU at hand: random weights, random KV, every row continuing by itself.

One JSON line a cell: `step_ms` is the median wall time from one read to the next with `--run-ahead` steps under way, as
a worker runs them (launch, read, no scheduler); `gpu_ms` the median of the GPU's own time of the captured step and the
copies around it, launched one by one; `host_ms` what a launch takes the host. With `--breakdown` another line a cell,
once all are timed: what the time goes to, and the least that it could be (step_breakdown.py).
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice, product

import torch

from baton.benchmark.gpu import step_breakdown
from baton.benchmark.gpu.runners import (
    BLOCK_TOKENS,
    PLAIN,
    add_quantization,
    chat_lengths,
    given_formats,
    make_fallback,
    make_runners,
)
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.models.batch import Draw, Row
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.runner import CudaRunner
from baton.node.messages.control import SamplingSpec

CELLS = "1x1024,8x1024,16x1024,32x1024,64x1024,128x1024,256x1024,64x8192,1x32768,8x32768"
WARM_STEPS, STEPS = 5, 25
SLEEP_CYCLES = 4_000_000  # about 2 ms
FALLBACK = "fallback"
GREEDY = SamplingSpec(max_tokens=1 << 20, temperature=0.0)


def contexts_of(cell: str) -> list[int]:
    """The tokens of each row, from "64x1024" or "64xchats"."""
    rows, _, tokens = cell.partition("x")
    return chat_lengths(int(rows)) if tokens == "chats" else [int(tokens)] * int(rows)


def blocks_for(context: int) -> int:
    return -(-(context + 1) // BLOCK_TOKENS)


class DecodeBatch:
    """One sequence a row; each reaches its context length in the last timed step."""

    def __init__(
        self, contexts: Sequence[int], num_blocks: int, steps: int = WARM_STEPS + STEPS, num_adapters: int = 0
    ) -> None:
        """num_adapters: above 0, rows have those of the first slots in turn."""
        self._num_adapters = num_adapters
        blocks = iter(random.Random(0).sample(range(num_blocks), sum(map(blocks_for, contexts))))
        self._tables = [list(islice(blocks, blocks_for(context))) for context in contexts]
        self._starts = [context - steps for context in contexts]
        self._given = True

    def rows(self) -> list[Row]:
        """The next step's; the first brings its tokens, the others continue."""
        rows = [
            Row(
                [1000 + slot] if self._given else [],
                start,
                table,
                Draw(GREEDY, (), 1, 1),
                slot,
                adapter=slot % self._num_adapters if self._num_adapters else None,
            )
            for slot, (start, table) in enumerate(zip(self._starts, self._tables, strict=True))
        ]
        self._starts = [start + 1 for start in self._starts]
        self._given = False
        return rows


def step_ms(runner: CudaRunner, batch: DecodeBatch) -> tuple[float, float]:
    """Median wall time between two reads, and of a launch."""
    steps, read_at, host = [], [], []
    for _ in range(WARM_STEPS + STEPS):
        rows = batch.rows()
        began_at = time.perf_counter()
        steps.append(runner.launch(rows))
        host.append(time.perf_counter() - began_at)
        if len(steps) > runner.run_ahead:
            steps.pop(0).read()
            read_at.append(time.perf_counter())
    for launched in steps:
        launched.read()
    gaps = [after - before for before, after in zip(read_at[WARM_STEPS:], read_at[WARM_STEPS + 1 :], strict=False)]
    return statistics.median(gaps) * 1e3, statistics.median(host[WARM_STEPS:]) * 1e3


def gpu_ms(runner: CudaRunner, batch: DecodeBatch) -> float:
    """Median GPU time of single steps, by events around the launch on the runner's own stream."""
    times = []
    for _ in range(WARM_STEPS + STEPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        runner.queue.enqueue(partial(torch.cuda._sleep, SLEEP_CYCLES))  # so that the GPU waits for no launch
        runner.queue.enqueue(begin.record)
        launched = runner.launch(batch.rows())
        runner.queue.enqueue(end.record)
        launched.read()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_STEPS:])


def step(runner: CudaRunner, batch: DecodeBatch) -> None:
    runner.launch(batch.rows()).read()


def main(argv: Sequence[str]) -> int:
    parser = new_parser("decode", __doc__)
    parser.add_argument(
        "--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes; NAME:8: a rank's part of 8"
    )
    parser.add_argument("--cells", default=CELLS, help="rows x tokens or rows x chats, comma separated")
    parser.add_argument("--run-ahead", type=int, default=1, help="steps launched before one is read")
    parser.add_argument(
        "--deterministic", action="store_true", help="kernels whose result does not depend on the batch"
    )
    add_quantization(parser)
    parser.add_argument(
        "--fallback", action="store_true", help="the shape through transformers too, in turns; the line says fallback"
    )
    parser.add_argument("--breakdown", action="store_true", help="where the time of a step goes, beside its floors")
    parser.add_argument("--launches", action="store_true", help="with --breakdown: each launch of a step, too")
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    cells = {name: contexts_of(name) for name in options.cells.split(",")}
    ceilings = step_breakdown.ceilings(lines) if options.breakdown else None
    num_blocks = max(sum(map(blocks_for, contexts)) for contexts in cells.values()) + 8
    max_rows, longest = max(map(len, cells.values())), max(map(max, cells.values())) + 1
    limits = StepLimits(max_rows, 2048, options.run_ahead, options.deterministic)
    config, weights, runners = make_runners(lines, options.shape, given_formats(options), limits, num_blocks, longest)
    if options.fallback:
        pool = next(iter(runners.values()))[0]
        runners[FALLBACK, PLAIN] = pool, make_fallback(lines, options.shape, limits, pool, longest)
        weights[FALLBACK] = weights[PLAIN]  # as many bytes
    profiled: list[step_breakdown.Profiled] = []
    for (name, contexts), ((quantization, kv_dtype), (pool, runner)) in product(cells.items(), runners.items()):
        values = {"rows": len(contexts), "context": max(contexts), "quantization": quantization, "kv_dtype": kv_dtype}
        values |= {"cell": name} if "chats" in name else {}
        wall, host = step_ms(runner, DecodeBatch(contexts, pool.num_blocks))
        timed = gpu_ms(runner, DecodeBatch(contexts, pool.num_blocks))
        lines.put(
            "decode_step",
            **values,
            step_ms=round(wall, 3),
            gpu_ms=round(timed, 3),
            host_ms=round(host, 3),
            run_ahead=options.run_ahead,
            deterministic=options.deterministic,
        )
        if ceilings is not None:
            floors = step_breakdown.floors_s(
                config,
                weights[quantization],
                pool.key_bytes,
                [DecodeBatch(contexts, pool.num_blocks, 1).rows()],
                ceilings,
            )
            steps = DecodeBatch(contexts, pool.num_blocks, step_breakdown.PASSES)
            values = {"what": "decode_breakdown", **values}
            profiled.append(
                step_breakdown.Profiled(values, partial(step, runner, steps), timed, floors, options.launches)
            )
    if ceilings is not None:
        step_breakdown.report(lines, runner.queue, profiled)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
