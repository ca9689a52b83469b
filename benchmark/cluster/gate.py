"""Whether a worker loads a prefix from the store where that is faster than computing it, and only there.

A real worker and a real store whose disk is slowed to a given rate (testing/paced_store.py). For each prompt length:

    computed   TTFT of new prompts: the one side, forced
    even       bytes of a prompt / (computed - TTFT of a prompt in the pool): the speed of disk where both are equal
    loaded     TTFT at factor * even with `--store-loads always`: the other side, forced
    chosen     what a fresh worker does at that speed with `--store-loads measured`, after warm-up

More prompts than pool and RAM hold come in turns, so each is on disk alone. A decision is right if the side that it
took has the lower median; where they differ by less than 10 % it is a tie, judged as neither. JSON lines: `sides` a
length, `loaded` and `case` a length and factor, `summary`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.benchmark.cluster.completions import CompletionClient, Streamed, random_ids
from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.cluster.running import (
    ServedModel,
    metrics,
    running,
    served_model,
    wait_metrics,
)
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import cluster_parser
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec

FACTORS = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)
TIE = 0.1
SPARE_BLOCKS = 8
ROOM = 1.25
GIB = 1 << 30
DISK_TIMEOUT_S = 20.0
WORKER = "decode-0"
COUNTERS = ("loads", "gate_refused", "loads_stopped", "lookups_late")


@dataclass(frozen=True, slots=True)
class GateSizes:
    """Sizes that force prompts out of pool and RAM. `lengths` fall."""

    block_tokens: int
    block_bytes: int
    lengths: tuple[int, ...]
    answer_tokens: int

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    @property
    def pool_blocks(self) -> int:
        return self.blocks(self.lengths[0] + self.block_tokens + 1 + self.answer_tokens) + SPARE_BLOCKS

    @property
    def ram_blocks(self) -> int:
        """A quarter of it, a prompt, may wait to be written to disk."""
        return 9 * self.pool_blocks // 2

    def num_prompts(self, length: int) -> int:
        """So many in turns that none is in the pool or in RAM when its turn comes."""
        return int(ROOM * (self.pool_blocks + self.ram_blocks) / self.blocks(length)) + 2

    @property
    def disk_gib(self) -> float:
        blocks = sum(self.num_prompts(length) * (self.blocks(length) + 2) for length in self.lengths)
        return ROOM * blocks * self.block_bytes / GIB


@dataclass(frozen=True, slots=True)
class GateCase:
    """Medians of both sides in seconds, and the number of requests whose KV was loaded."""

    computed_s: float
    loaded_s: float
    took_load: int
    requests: int

    @property
    def tie(self) -> bool:
        return abs(self.computed_s - self.loaded_s) < TIE * min(self.computed_s, self.loaded_s)

    @property
    def right(self) -> int:
        """Decisions for the faster side; a tie has none."""
        if self.tie:
            return 0
        return self.took_load if self.loaded_s < self.computed_s else self.requests - self.took_load


class GateBenchmark:
    """Sends the requests, one at a time, and writes the lines."""

    def __init__(
        self, cluster: Cluster, sizes: GateSizes, rate_file: Path, lines: JsonLines, options: argparse.Namespace
    ) -> None:
        self._cluster = cluster
        self._client = CompletionClient(cluster.url, cluster.model)
        self._sizes = sizes
        self._rate_file = rate_file
        self._lines = lines
        self._options = options
        self._new = count()
        self._turns = {length: cycle(range(sizes.num_prompts(length))) for length in sizes.lengths}
        self._even: dict[int, float] = {}
        self._loaded_s: dict[tuple[int, float], float] = {}

    def run(self) -> None:
        for length in self._sizes.lengths:
            self._fill_disk(length)
        for length in self._sizes.lengths:
            self._sides(length)
        self._cluster.restart(WORKER, "--store-loads=measured")
        cases = []
        for length in self._sizes.lengths:
            for factor in self._options.factors:
                cases.append(self._case(length, factor))
        judged = [case for case in cases if not case.tie]
        self._lines.put(
            "summary",
            cases=len(cases),
            ties=len(cases) - len(judged),
            decisions=sum(case.requests for case in judged),
            right=sum(case.right for case in judged),
            right_share=sum(case.right for case in judged) / (sum(case.requests for case in judged) or 1),
        )

    def _fill_disk(self, length: int) -> None:
        """A block goes to disk at its second use: when it is looked up with another block behind it."""
        for number in range(self._sizes.num_prompts(length)):
            self._client.first_token(self._prompt(length, number, 0), self._sizes.answer_tokens)
            metrics(self._cluster, 0.3)
            self._client.first_token(self._prompt(length, number, self._sizes.block_tokens))
            if not wait_metrics(self._cluster, _has_written, DISK_TIMEOUT_S):
                raise BenchmarkFailed(f"blocks were not on disk within {DISK_TIMEOUT_S:g} s")

    def _sides(self, length: int) -> None:
        """The time of each side, forced."""
        num = self._options.requests
        computed, again = [], []
        for number in [next(self._new) for _ in range(num + 1)]:
            computed.append(self._ask_new(length, number))
            again.append(self._ask_new(length, number))
        computed_s, pool_s = (_median(each[1:]) for each in (computed, again))
        size = self._sizes.blocks(length) * self._sizes.block_bytes
        even = self._even[length] = size / max(computed_s - pool_s, 1e-4)
        for factor in self._options.factors:
            self._rate_file.write_text(str(factor * even))
            before = metrics(self._cluster)
            firsts = [self._ask_stored(length) for _ in range(num)]
            self._loaded_s[length, factor] = _median(firsts)
            disk = _counted("prompt_tokens", before, metrics(self._cluster), source="disk") / (num * length)
            self._lines.put("loaded", length=length, factor=factor, ttft_ms=_ms(firsts), from_disk=disk)
        self._lines.put(
            "sides",
            length=length,
            computed_ms=_ms(computed[1:]),
            in_pool_ms=_ms(again[1:]),
            even_gb_per_s=even / 1e9,
            prompts_in_turns=self._sizes.num_prompts(length),
        )

    def _case(self, length: int, factor: float) -> GateCase:
        """Warm up at this rate, then let the worker choose; new prompts in between show what computing takes now."""
        self._rate_file.write_text(str(factor * self._even[length]))
        if self._options.restart:
            self._cluster.restart(WORKER)
        for _ in range(self._options.warmups):
            self._ask_new(length, next(self._new))
            self._ask_stored(length)
        before = metrics(self._cluster)
        computed, chosen = [], []
        for _ in range(self._options.requests):
            computed.append(self._ask_new(length, next(self._new)))
            chosen.append(self._ask_stored(length))
        after = metrics(self._cluster)
        took_load = sum(first.cached_tokens >= length / 2 for first in chosen)
        case = GateCase(_median(computed), self._loaded_s[length, factor], took_load, len(chosen))
        self._lines.put(
            "case",
            length=length,
            factor=factor,
            disk_gb_per_s=factor * self._even[length] / 1e9,
            computed_ms=1000 * case.computed_s,
            loaded_ms=1000 * case.loaded_s,
            chosen_ms=_ms(chosen),
            took_load=f"{took_load}/{case.requests}",
            tie=case.tie,
            right=None if case.tie else f"{case.right}/{case.requests}",
            **{name: _counted(f"worker_store_{name}", before, after) for name in COUNTERS},
        )
        return case

    def _prompt(self, length: int, number: int, more: int) -> list[int]:
        return random_ids(length + 1 + more, self._options.seed, "stored", length, number)

    def _ask_stored(self, length: int) -> Streamed:
        return self._ask(self._prompt(length, next(self._turns[length]), 0))

    def _ask_new(self, length: int, number: int) -> Streamed:
        return self._ask(random_ids(length + 1, self._options.seed, "new", length, number))

    def _ask(self, ids: Sequence[int]) -> Streamed:
        time.sleep(self._options.settle_s)  # the write-behind of the last request must not slow this one
        return self._client.first_token(ids)


def _median(firsts: Sequence[Streamed]) -> float:
    return statistics.median(first.ttft_s for first in firsts)


def _ms(firsts: Sequence[Streamed]) -> list[float]:
    return [1000 * first.ttft_s for first in firsts]


def _has_written(page: MetricsPage) -> bool:
    return page.total("baton:store_disk_writing_blocks") == 0


def _counted(name: str, before: MetricsPage, after: MetricsPage, **labels: str) -> float:
    return after.total(f"baton:{name}_total", **labels) - before.total(f"baton:{name}_total", **labels)


def slowed(spec: ChildSpec, rate_file: Path) -> ChildSpec:
    """The store's command with a slowed disk; other commands unchanged."""
    if spec.name != "store":
        return spec
    program, _, _, _, *arguments = spec.argv  # python -m kvtransfer ...
    return replace(spec, argv=(program, "-P", "-m", "baton.testing.paced_store", str(rate_file), *arguments))


def settings_of(sizes: GateSizes, model: ServedModel, disk: Path, options: argparse.Namespace) -> ServeSettings:
    longest = sizes.lengths[0] + sizes.block_tokens + 1 + sizes.answer_tokens
    return ServeSettings(
        model=model.name,
        prefill=0,
        decode=1,
        device=options.device,
        gpus=(options.gpu,) if options.device == "cuda" else (),
        store_ram_gib=sizes.ram_blocks * sizes.block_bytes / GIB,
        store_disk_gib=sizes.disk_gib,
        store_path=disk,
        worker_arg=(
            f"--num-blocks={sizes.pool_blocks}",
            f"--max-model-len={longest}",
            "--store-loads=always",
            *model.worker_args,
            *options.worker_arg,
        ),
        start_timeout_s=options.start_timeout_s,
    )


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines = JsonLines(options.output)
    lines.begin(argv)
    lengths = tuple(sorted(options.lengths, reverse=True))
    with TemporaryDirectory(dir=options.path) as disk, served_model(options) as model:
        sizes = GateSizes(model.block_tokens, model.block_bytes, lengths, options.answer_tokens)
        rate_file = Path(disk) / "rate"
        rate_file.write_text("")
        try:
            settings = settings_of(sizes, model, Path(disk) / "store", options)
            with running(settings, edit=lambda spec: slowed(spec, rate_file)) as (cluster, ready_s):
                lines.put("start", ready_s=ready_s, disk_gib=sizes.disk_gib, ram_gib=settings.store_ram_gib)
                GateBenchmark(cluster, sizes, rate_file, lines, options).run()
        except BenchmarkFailed as error:
            lines.put("failed", error=str(error))
            return 1
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("gate", __doc__)
    add = parser.add_argument
    add("--gpu", type=int, default=0, help="the GPU")
    add("--lengths", type=int, nargs="+", help="tokens that are on disk; default 2048 8192, on CPU 256 768")
    add("--factors", type=float, nargs="+", default=list(FACTORS), help="speeds, as parts of the even one")
    add("--requests", type=int, default=5, help="requests of each kind in a case")
    add("--warmups", type=int, default=3, help="of each kind, before them")
    add("--settle-s", type=float, default=0.2, help="before each request")
    add("--restart", action=argparse.BooleanOptionalAction, default=True, help="a fresh worker for each case")
    add("--answer-tokens", type=int, default=64, help="of what is written to the store, while it is written")
    add("--path", type=Path, help="folder for the disk; default: that of temporary files")
    add("--seed", type=int, default=0, help="of the prompts")
    options = parser.parse_args(argv)
    options.lengths = options.lengths or ([256, 768] if options.device == "cpu" else [2048, 8192])
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
