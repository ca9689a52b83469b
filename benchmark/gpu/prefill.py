"""Times the computing of prompts by a served runner on the GPU at hand: random weights, prompts in chunks of a budget.

One JSON line a cell: `prompts` of `tokens` each, computed in steps of `--budget` tokens with one step under way while
the next is launched, as a worker does; tokens a second from first launch to last read, the median of three runs. With
`--breakdown` another line a cell, once all are timed: what the time of a run goes to, and the least that it could be
(step_breakdown.py).

`--prompt-logprobs K` adds a line a cell: the same prompts without and with log probabilities of all their tokens, in
turns, and the memory that these take.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch

from baton.benchmark.gpu import step_breakdown
from baton.benchmark.gpu.runners import BLOCK_TOKENS, add_quantization, given_formats, make_runners
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.prompt_scores import SCORED_ROWS
from baton.models.cuda.runner import CudaRunner
from baton.node.messages.control import SamplingSpec

CELLS = "1x128,1x256,1x512,1x1024,1x2048,4x2048,1x8192,1x32768"
GREEDY = SamplingSpec(max_tokens=1 << 20, temperature=0.0)
RUNS = 3
SCORED_RUNS = 7


def steps(num_prompts: int, tokens: int, budget: int, num_blocks: int, num_top: int | None = None) -> list[list[Row]]:
    """The prompts' chunks, packed to the budget; with log probabilities of the prompts unless num_top is None."""
    chance = random.Random(0)
    each = -(-tokens // BLOCK_TOKENS)
    blocks = chance.sample(range(num_blocks), num_prompts * each)
    made: list[list[Row]] = [[]]
    room = budget
    for slot in range(num_prompts):
        table, start = blocks[slot * each : (slot + 1) * each], 0
        prompt = [chance.randrange(100_000) for _ in range(tokens)]
        while start < tokens:
            if room == 0:
                made.append([])
                room = budget
            length = min(tokens - start, room)
            draw = Draw(GREEDY, (), tokens, 0) if start + length == tokens else None
            followed = prompt[start + 1 : start + length + 1]
            targets = PromptTargets(0, followed, num_top) if num_top is not None and followed else None
            made[-1].append(Row(prompt[start : start + length], start, table, draw, slot, targets))
            start, room = start + length, room - length
    return made


def run(runner: CudaRunner, batches: list[list[Row]]) -> float:
    """Seconds for all of them."""
    launched = []
    began_at = time.perf_counter()
    for rows in batches:
        launched.append(runner.launch(rows))
        if len(launched) > runner.run_ahead:
            launched.pop(0).read()
    for step in launched:
        step.read()
    return time.perf_counter() - began_at


def compare_scored(
    lines: JsonLines, runner: CudaRunner, plain: list[list[Row]], scored: list[list[Row]], **cell: int
) -> None:
    """A line with the time of a cell without and with log probabilities of its prompts, in turns, and their memory."""
    took: dict[bool, list[float]] = {False: [], True: []}
    peak_bytes: dict[bool, int] = {}
    run(runner, scored)
    for with_scores in (False, True) * SCORED_RUNS:
        torch.cuda.reset_peak_memory_stats()
        took[with_scores].append(run(runner, scored if with_scores else plain))
        peak_bytes[with_scores] = torch.cuda.max_memory_allocated()
    plain_s, scored_s = statistics.median(took[False]), statistics.median(took[True])
    lines.put(
        "prefill_prompt_logprobs",
        **cell,
        plain_ms=round(plain_s * 1e3, 2),
        scored_ms=round(scored_s * 1e3, 2),
        ratio=round(scored_s / plain_s, 3),
        extra_mib=round((peak_bytes[True] - peak_bytes[False] + runner.score_bytes) / (1 << 20), 1),
    )


def main(argv: Sequence[str]) -> int:
    parser = new_parser("prefill", __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--cells", default=CELLS, help="prompts x tokens, comma separated")
    parser.add_argument("--budget", type=int, default=8192, help="tokens a step")
    add_quantization(parser)
    parser.add_argument("--breakdown", action="store_true", help="where the time of a run goes, beside its floors")
    parser.add_argument(
        "--prompt-logprobs",
        type=int,
        metavar="K",
        help="time each cell also with log probabilities of the prompts and K likeliest tokens, in turns",
    )
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    cells = [tuple(int(number) for number in cell.split("x")) for cell in options.cells.split(",")]
    ceilings = step_breakdown.ceilings(lines) if options.breakdown else None
    longest, most = max(tokens for _, tokens in cells) + 1, max(prompts for prompts, _ in cells)
    num_blocks = max(prompts * -(-tokens // BLOCK_TOKENS) for prompts, tokens in cells) + 8
    limits = StepLimits(max(most, SCORED_ROWS), options.budget)
    config, weights, runners = make_runners(lines, options.shape, given_formats(options), limits, num_blocks, longest)
    profiled: list[step_breakdown.Profiled] = []
    for (prompts, tokens), ((quantization, kv_dtype), (pool, runner)) in product(cells, runners.items()):
        batches = steps(prompts, tokens, options.budget, pool.num_blocks)
        run(runner, batches)
        took = statistics.median(run(runner, batches) for _ in range(RUNS))
        lines.put(
            "prefill",
            prompts=prompts,
            tokens=tokens,
            budget=options.budget,
            quantization=quantization,
            kv_dtype=kv_dtype,
            ms=round(took * 1e3, 2),
            tokens_s=round(prompts * tokens / took),
        )
        if options.prompt_logprobs is not None:
            scored = steps(prompts, tokens, options.budget, pool.num_blocks, options.prompt_logprobs)
            compare_scored(lines, runner, batches, scored, prompts=prompts, tokens=tokens)
        if ceilings is not None:
            values = {"what": "prefill_breakdown", "prompts": prompts, "tokens": tokens, "budget": options.budget}
            values |= {"quantization": quantization, "kv_dtype": kv_dtype}
            floors = step_breakdown.floors_s(config, weights[quantization], pool.key_bytes, batches, ceilings)
            profiled.append(step_breakdown.Profiled(values, partial(run, runner, batches), took * 1e3, floors))
    if ceilings is not None:
        step_breakdown.report(lines, runner.queue, profiled)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
