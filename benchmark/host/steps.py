"""Times single steps of a model on this machine's CPU, as JSON lines for `baton simulate fit`.

Every cell of the grid is measured `--repeat` times, in rounds over the whole grid, so that a disturbance meets all
cells alike; a line holds the median. One thread, as a worker of `baton serve` has on two cores.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class StepShape:
    """Prompts to compute whole, or contexts to compute one more token each of."""

    kind: str
    lengths: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return sum(-(-length // BLOCK_TOKENS) for length in self.lengths)

    def rows(self, vocab_size: int) -> list[Row]:
        sampling, rows, block = SamplingSpec(max_tokens=1 << 19, temperature=0.0), [], 0
        for length in self.lengths:
            blocks = tuple(range(block, block + -(-length // BLOCK_TOKENS)))
            block += len(blocks)
            ids = tuple(random.randrange(vocab_size) for _ in range(length))
            start = 0 if self.kind == "prefill" else length - 1
            rows.append(Row(ids[start:], start, blocks, Draw(sampling, ids, length, 0)))
        return rows

    def values(self, seconds: float) -> dict[str, object]:
        prefill = self.kind == "prefill"
        lengths = self.lengths if prefill else ()
        context = 0 if prefill else sum(self.lengths)
        found = {"kind": self.kind, "lengths": lengths, "context": context, "batch": len(self.lengths)}
        return {**found, "seconds": seconds}


def grid(longest: int, budget: int) -> list[StepShape]:
    """Prompts of 16 to `longest` tokens, alone and packed into `budget`; 1 to 64 rows on contexts up to `longest`."""
    lengths = [n for n in (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096) if n <= longest]
    prefills = [StepShape("prefill", (n,) * count) for n in lengths for count in (1, 2, 4, 8) if n * count <= budget]
    batches = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    decodes = [
        StepShape("decode", (n,) * batch) for n in (32, 64, 128, 256, 512, 1024) if n < longest for batch in batches
    ]
    return [*prefills, *decodes]


def measure(runner: ModelRunner, cells: Sequence[StepShape], repeat: int) -> list[float]:
    pool = torch.zeros(runner.kv_shape(max(cell.num_blocks for cell in cells), BLOCK_TOKENS), dtype=runner.kv_dtype)
    runner.bind_pool(pool)
    seconds: list[list[float]] = [[] for _ in cells]
    for turn in range(repeat + 1):
        for taken, cell in zip(seconds, cells, strict=True):
            rows = cell.rows(runner.config.vocab_size)
            begin = time.perf_counter()
            runner.launch(rows).read()
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in seconds]


def main(argv: Sequence[str]) -> int:
    parser = new_parser("steps", __doc__)
    parser.add_argument("--model", default="demo", help="the demo model, or a Hugging Face folder")
    parser.add_argument("--repeat", type=int, default=5, help="times that a step is measured, after one that warms up")
    parser.add_argument("--budget", type=int, default=512, help="most tokens in a prefill step")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    runner = ModelRunner.load(locate_model(options.model))
    random.seed(0)
    cells = grid(min(runner.config.max_position_embeddings, options.budget), options.budget)
    lines = JsonLines(options.output)
    for cell, seconds in zip(cells, measure(runner, cells, options.repeat), strict=True):
        lines.write(**cell.values(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
