"""The time of one routing decision: a lookup of the prompt in the index, and the choice of both workers.

Half of the workers prefill, half decode; every pool also holds as many blocks that no other worker has. The cases: a
prompt that no worker holds, one that a single worker holds, such a one behind a system prompt of 16 blocks that all
hold, a prompt of which all hold some part, and that with a store for each eight workers and siblings on their way.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import machine_text
from baton.benchmark.harness.statistics import percentile
from baton.benchmark.load.table import markdown
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


class LargeCluster:
    """Index and view of a large cluster, as a proxy has them."""

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

    def times_ms(self, hashes: tuple[bytes, ...], repeat: int) -> list[float]:
        taken = []
        for _ in range(repeat):
            begin = time.perf_counter()
            self.decide(hashes)
            taken.append((time.perf_counter() - begin) * 1000)
        return taken


def main(argv: Sequence[str]) -> int:
    parser = new_parser("pick", __doc__)
    parser.add_argument("--workers", type=int, default=1000, help="workers of the cluster")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of the prompt")
    parser.add_argument("--repeat", type=int, default=300, help="decisions of each case")
    options = parser.parse_args(argv)
    lines, cluster = JsonLines(options.output), LargeCluster(options.workers, options.blocks)
    lines.begin(argv)
    mixed = cluster.hot[:SYSTEM_BLOCKS] + cluster.one[SYSTEM_BLOCKS:]
    cases = [("none", cluster.cold), ("one", cluster.one), ("all a prefix", mixed), ("all a part", cluster.hot)]
    rows = []
    for name, hashes in [*cases, ("all, with stores and siblings", cluster.hot)]:
        if name.startswith("all, with"):
            cluster.add_stores()
        taken = cluster.times_ms(hashes, options.repeat)
        found = {percent: percentile(taken, percent) for percent in (50, 90, 99)}
        lines.put("pick", holders=name, **{f"p{percent}_ms": value for percent, value in found.items()})
        rows.append([name, *(f"{value:.2f} ms" for value in found.values())])
    print(markdown(("workers that hold the prompt", "p50", "p90", "p99"), rows))
    print(f"{options.workers} workers, {options.blocks} blocks; {machine_text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
