"""How long one routing decision takes: looking a prompt up in the index and choosing both workers. No processes.

    scripts/bench_pick [--workers 1000] [--blocks 200] [--repeat 300]

Half of the workers prefill, half decode; every pool holds as many blocks again that nobody else has. The cases: a
prompt that nobody holds, one that a single worker holds, a system prompt of 16 blocks that all hold before such a one,
a prompt of which all hold some part, and that with a store behind each eight workers and siblings on their way.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence

from baton.node.messages.control import TierChange
from baton.proxy.routing.kvindex import KvIndex
from baton.proxy.routing.router import RequestView, RoutingRules, WorkerView, pick

BLOCK_TOKENS = 64
WORKERS_A_STORE = 8
SYSTEM_BLOCKS = 16
RULES = RoutingRules("kv-aware", "auto", 16, 0.25)


def _hashes(rng: random.Random, count: int) -> tuple[bytes, ...]:
    return tuple(rng.randbytes(32) for _ in range(count))


def _view(number: int) -> WorkerView:
    return WorkerView(
        identity=f"w{number}/1",
        address="tcp://127.0.0.1:1",
        role="prefill" if number % 2 else "decode",
        draining=False,
        requests=number % 5,
        tokens=1000 + number % 7 * 100,
        free_blocks=5000,
        total_blocks=8000,
        max_num_seqs=64,
        tokens_s=40_000.0,
    )


class Bench:
    """A cluster's index and view, as a proxy has them."""

    def __init__(self, workers: int, blocks: int) -> None:
        rng = random.Random(1)
        self.index = KvIndex(1 << 22)
        self.view = tuple(_view(number) for number in range(workers))
        self.hot, self.cold, self.one = (_hashes(rng, blocks) for _ in range(3))
        for worker in self.view:
            self.index.reset(worker.identity)
            held = self.hot[: rng.choice((blocks, blocks, SYSTEM_BLOCKS, rng.randrange(SYSTEM_BLOCKS, blocks + 1)))]
            self.index.apply(worker.identity, [TierChange("gpu", (*held, *_hashes(rng, blocks)))])
        self.index.apply(self.view[-1].identity, [TierChange("gpu", self.one)])

    def add_stores(self) -> None:
        for number, worker in enumerate(self.view):
            store = f"s{number // WORKERS_A_STORE}/1"
            self.index.apply(store, [TierChange("ram", self.hot[::2]), TierChange("disk", self.hot)])
            self.index.attach(worker.identity, store)
        for worker in self.view[:10]:
            self.index.expect(worker.identity, self.hot)

    def decide(self, hashes: tuple[bytes, ...]) -> None:
        request = RequestView(
            num_tokens=len(hashes) * BLOCK_TOKENS + 1,
            num_blocks=len(hashes) + 1,
            turn=1,
            block_tokens=BLOCK_TOKENS,
            hashes=hashes,
            hits=self.index.match(hashes),
        )
        pick(self.view, request, RULES)

    def time_ms(self, hashes: tuple[bytes, ...], repeat: int) -> list[float]:
        taken = []
        for _ in range(repeat):
            begin = time.perf_counter()
            self.decide(hashes)
            taken.append((time.perf_counter() - begin) * 1000)
        return sorted(taken)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_pick", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=1000, help="workers of the cluster")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of the prompt")
    parser.add_argument("--repeat", type=int, default=300, help="decisions of each case")
    options = parser.parse_args(argv)
    bench = Bench(options.workers, options.blocks)
    mixed = bench.hot[:SYSTEM_BLOCKS] + bench.one[SYSTEM_BLOCKS:]
    cases = [("nobody", bench.cold), ("one worker", bench.one), ("all a beginning", mixed), ("all a part", bench.hot)]
    print("| who holds the prompt | p50 | p90 | p99 |\n|---|---|---|---|")
    for name, hashes in [*cases, ("all, with stores and siblings", bench.hot)]:
        if name.startswith("all, with"):
            bench.add_stores()
        taken = bench.time_ms(hashes, options.repeat)
        p90, p99 = (taken[min(len(taken) - 1, int(part * len(taken)))] for part in (0.9, 0.99))
        print(f"| {name} | {statistics.median(taken):.2f} ms | {p90:.2f} ms | {p99:.2f} ms |")
    print(f"{options.workers} workers, {options.blocks} blocks; {platform.machine()}, {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
