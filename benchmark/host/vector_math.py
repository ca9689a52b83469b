"""How often the first table of cosines that a process makes is wrong: see models/vector_math.py.

Each process is forked from one that has imported torch and computed nothing, makes the table twice, in many threads,
and compares: the second is right. With --prepared it first calls what workers call. One JSON line for each wrong
table, and one with their number. They are rare: with 31 threads on two busy cores one process in several hundred.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.models.rope import inverse_frequencies
from baton.models.rope_config import RopeConfig
from baton.models.vector_math import prepare_vector_math

ROPE = RopeConfig("default", 500_000.0, 128)
ANSWER_BYTES = 4096


def wrong_part(positions: int, prepared: bool) -> dict[str, object]:
    """What differs between this process's first table and its second; empty where nothing does."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(ROPE)
    if prepared:
        prepare_vector_math()
    first, second = angles.cos(), angles.cos()
    differing = (first != second).any(1).nonzero()
    if not len(differing):
        return {}
    between = int(differing[0]), int(differing[-1])
    return {
        "elements": int((first != second).sum()),
        "positions": between,
        "error": float((first - second).abs().max()),
    }


def in_processes(count: int, at_once: int, threads: int, positions: int, prepared: bool) -> Iterator[dict[str, object]]:
    """What each process found, in the order of their ends."""
    running: dict[int, int] = {}  # where its answer comes, by process
    started = 0
    while running or started < count:
        while started < count and len(running) < at_once:
            answer, into = os.pipe()
            if not (child := os.fork()):
                try:
                    torch.set_num_threads(threads)
                    os.write(into, json.dumps(wrong_part(positions, prepared)).encode())
                finally:
                    os._exit(0)
            os.close(into)
            running[child] = answer
            started += 1
        ended, _ = os.wait()
        answer = running.pop(ended)
        found = os.read(answer, ANSWER_BYTES)
        os.close(answer)
        yield json.loads(found)


def main(argv: Sequence[str]) -> int:
    parser = new_parser("vector-math", __doc__)
    add = parser.add_argument
    add("--processes", type=int, default=1000, help="processes that make a table")
    add("--at-once", type=int, default=8, help="of them at a time")
    add("--threads", type=int, default=31, help="threads of each")
    add("--positions", type=int, default=2064, help="of the table")
    add("--prepared", action="store_true", help="as workers do: one number before the table")
    options = parser.parse_args(argv)
    count, threads, prepared = options.processes, options.threads, options.prepared
    lines, wrong = JsonLines(options.output), 0
    lines.begin(argv)
    for found in in_processes(count, options.at_once, threads, options.positions, prepared):
        if found:
            wrong += 1
            lines.put("wrong", **found)
    lines.put("vector-math", prepared=prepared, threads=threads, processes=count, wrong=wrong)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
