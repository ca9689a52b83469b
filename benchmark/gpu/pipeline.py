"""Prompts through the stages of a prefill worker, a GPU each, beside a worker on one GPU.

Each worker is loaded by itself, with random weights, as `baton prefill` loads it: processes, links and pools are its
own. One JSON line a length of prompts: `ttft_ms`, the median from the launch of a prompt's first chunk to its token,
where it is alone; and `tokens_s` of many prompts, a chunk of one in each step, with as many steps in flight as the
worker has.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from baton.benchmark.gpu.decode import GREEDY, blocks_for
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import MeasuringChild, answer_requests
from baton.benchmark.harness.shapes import SHAPES, shape_names
from baton.models.batch import Draw, Launched, Row
from baton.prefill.settings import PrefillSettings
from baton.worker.build_cpu import load_model
from baton.worker.parts import Runner

ALONE, WARM, TIMED_TOKENS = 7, 2, 1 << 17
"""Prompts that are alone, of which the first two are not counted; tokens of those that are not."""


def chunks_of(prompt_tokens: int, chunk_tokens: int) -> Iterator[Row]:
    """Of a prompt, first to last; the last one draws."""
    blocks = list(range(blocks_for(prompt_tokens)))
    for start in range(0, prompt_tokens, chunk_tokens):
        end = min(start + chunk_tokens, prompt_tokens)
        draw = Draw(GREEDY, (), prompt_tokens, 0) if end == prompt_tokens else None
        yield Row([1] * (end - start), start, blocks, draw)


def run(runner: Runner, rows: Sequence[Row]) -> None:
    """A step each, as far ahead as the runner is."""
    in_flight: deque[Launched] = deque()
    for row in rows:
        if len(in_flight) > runner.run_ahead:
            in_flight.popleft().read()
        in_flight.append(runner.launch([row]))
    while in_flight:
        in_flight.popleft().read()


def measure(runner: Runner, prompt_tokens: int, chunk_tokens: int) -> dict[str, float]:
    rows, times = list(chunks_of(prompt_tokens, chunk_tokens)), []
    for _ in range(ALONE):
        began_at = time.perf_counter()
        run(runner, rows)
        times.append(time.perf_counter() - began_at)
    num_prompts = max(4, TIMED_TOKENS // prompt_tokens)
    began_at = time.perf_counter()
    run(runner, rows * num_prompts)
    tokens_s = num_prompts * prompt_tokens / (time.perf_counter() - began_at)
    return {"ttft_ms": statistics.median(times[WARM:]) * 1e3, "tokens_s": tokens_s}


def serve(settings: PrefillSettings, shape: str) -> None:
    """Load the worker, and answer [prompt tokens, tokens of a chunk]."""
    model = load_model(settings, settings.worker_sizes("cuda"), "cuda", "prefill", SHAPES / shape)

    def answer(request: list[int]) -> Any:
        return measure(model.runner, *request)

    try:
        answer_requests(answer)
    finally:
        model.ranks.close()
        model.pool.close()


def main(argv: Sequence[str]) -> int:
    parser = new_parser("pipeline", __doc__)
    parser.add_argument("--gpus", nargs="+", type=int, default=[0, 1], help="of the stages, in their order")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=shape_names(), help="model: one of benchmark/shapes")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[2048, 16384], help="lengths of prompts")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="of a prompt in a step")
    parser.add_argument("--num-blocks", type=int, default=512, help="of the pools")
    parser.add_argument("--one-gpu", action="store_true", help="one stage too, on the first of the GPUs, and first")
    parser.add_argument("--serve", action="store_true", help="measure what standard input asks for")
    options = parser.parse_args(argv)
    if options.serve:
        settings = PrefillSettings(
            device="cuda",
            load_format="dummy",
            gpu=options.gpus[0],
            pp=len(options.gpus),
            rank_gpus=tuple(options.gpus) if len(options.gpus) > 1 else (),
            num_blocks=options.num_blocks,
            max_num_seqs=16,
            max_num_batched_tokens=options.chunk_tokens,
            max_model_len=max(options.prompt_tokens) + 1,
        )
        serve(settings, options.shape)
        return 0
    lines = JsonLines(options.output)
    lines.begin(argv)
    for gpus in ([options.gpus[0]], options.gpus) if options.one_gpu else (options.gpus,):
        lengths = [str(each) for each in options.prompt_tokens]
        with MeasuringChild(
            *("pipeline", "--serve", "--gpus", *map(str, gpus), "--shape", options.shape),
            *("--num-blocks", str(options.num_blocks), "--chunk-tokens", str(options.chunk_tokens)),
            *("--prompt-tokens", *lengths),
        ) as child:
            for tokens in options.prompt_tokens:
                found = child.ask([tokens, options.chunk_tokens])
                sizes = {"shape": options.shape, "stages": len(gpus), "tokens": tokens, "chunk": options.chunk_tokens}
                lines.put("prompts", **sizes, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
