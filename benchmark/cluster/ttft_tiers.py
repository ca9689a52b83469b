"""TTFT of a prompt by where its KV comes from: computed, the GPU's pool, the store's RAM, its disk.

One worker that computes and decodes, and a store. Prompts are random and of `--lengths` tokens and one, so that one
token is left to compute; each is asked for once in each state:

    computed   it is new
    gpu        again at once
    ram        again after prompts that fill the pool, which is no larger than the longest
    disk       again after that, the store having been killed: RAM is empty, the disk has what was used twice

The source of the KV is read from the proxy's metrics: `as_claimed` is false where less than 95 % of the prompts came
from there (computed: where anything was cached). JSON lines: `start`; `ttft` a state and length, medians over
`--repetitions`; loads also in GB/s, over the time from the request to the store until the last block is in the pool.
With `--device cpu` the demo model and small sizes: to try the script, not to learn from.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

COMPUTED, GPU, RAM, DISK = "computed", "gpu", "ram", "disk"
SPARE_BLOCKS = 8
CLAIMED_PART = 0.95
ROOM = 1.3
"""RAM and disk have so many times the room that all prompts take."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Sizes of blocks, pool and store. `lengths` fall."""

    block_tokens: int
    block_bytes: int
    lengths: tuple[int, ...]
    repetitions: int
    answer_tokens: int

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    @property
    def pool_blocks(self) -> int:
        """The longest request fits, and little else."""
        return self.blocks(self.lengths[0] + 1 + self.answer_tokens) + SPARE_BLOCKS

    @property
    def store_gib(self) -> float:
        """All prompts with their answers, one of each length for the warm-up included."""
        each = sum(self.blocks(length + 1 + self.answer_tokens) for length in self.lengths)
        return ROOM * (self.repetitions + 1) * each * self.block_bytes / GIB


class TierBenchmark:
    """Sends the prompts in all states, and writes the lines."""

    def __init__(self, cluster: Cluster, sizes: TierSizes, lines: JsonLines, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._client = CompletionClient(cluster.url, cluster.model)
        self._sizes = sizes
        self._lines = lines
        self._options = options
        self._computed_ms: dict[int, float] = {}

    def run(self) -> None:
        """Longest prompts first, in every state: the first of them fills the pool, so that no other is left in it."""
        for length in self._sizes.lengths:
            self._ask(length, -1, self._sizes.answer_tokens)  # kernels, connections
        for length in self._sizes.lengths:
            self._computed_and_gpu(length)
        for length in self._sizes.lengths:
            self._from_store(RAM, length)
        self._wait_written()
        self._cluster.restart("store")
        if not wait_metrics(self._cluster, _has_disk, self._options.patience_s):
            raise BenchmarkFailed("the store did not come back with its disk")
        for length in self._sizes.lengths:
            self._from_store(DISK, length)

    def _computed_and_gpu(self, length: int) -> None:
        before = metrics(self._cluster)
        firsts: dict[str, list[Streamed]] = {COMPUTED: [], GPU: []}
        for number in range(self._sizes.repetitions):
            firsts[COMPUTED].append(self._ask(length, number, self._sizes.answer_tokens))
            firsts[GPU].append(self._ask(length, number, 1))
        after = metrics(self._cluster)
        was_cached = sum(first.cached_tokens for first in firsts[COMPUTED])
        self._computed_ms[length] = 1000 * statistics.median(first.ttft_s for first in firsts[COMPUTED])
        mine = {COMPUTED: float((length + 1) * self._sizes.repetitions - was_cached), "cached": float(was_cached)}
        self._put(COMPUTED, length, firsts[COMPUTED], mine, was_cached == 0)
        found = sources(before, after)
        found[COMPUTED] = max(0.0, found.get(COMPUTED, 0.0) - mine[COMPUTED])
        self._put(GPU, length, firsts[GPU], found, found.get(GPU, 0.0) >= self._wanted(length))

    def _from_store(self, state: str, length: int) -> None:
        before = metrics(self._cluster)
        firsts = []
        for number in range(self._sizes.repetitions):
            firsts.append(self._ask(length, number, 1))
            if state == RAM:
                self._wait_written()
        after = metrics(self._cluster)
        found = sources(before, after)
        as_claimed = found.get(state, 0.0) >= self._wanted(length)
        self._put(state, length, firsts, found, as_claimed, **speeds(before, after))

    def _wanted(self, length: int) -> float:
        """Whole blocks of a prompt are what can be found."""
        whole = length // self._sizes.block_tokens * self._sizes.block_tokens
        return CLAIMED_PART * whole * self._sizes.repetitions

    def _put(
        self,
        state: str,
        length: int,
        firsts: Sequence[Streamed],
        tokens: dict[str, float],
        as_claimed: bool,
        **more: float | None,
    ) -> None:
        ttft_ms = [1000 * first.ttft_s for first in firsts]
        median = statistics.median(ttft_ms)
        self._lines.put(
            "ttft",
            source=state,
            length=length,
            ttft_ms=median,
            of_computed=median / self._computed_ms[length],
            all_ms=ttft_ms,
            as_claimed=as_claimed,
            tokens={source: count for source, count in tokens.items() if count},
            **more,
        )

    def _ask(self, length: int, number: int, max_tokens: int) -> Streamed:
        time.sleep(self._options.settle_s)  # the write-behind of the last request must not slow this one
        ids = random_ids(length + 1, self._options.seed, length, number)
        return self._client.first_token(ids, max_tokens)

    def _wait_written(self) -> None:
        """Blocks go to disk at their second use; while too many wait for it, others would be left out."""
        metrics(self._cluster)
        wait_metrics(self._cluster, _has_written, self._options.patience_s)


def _has_written(page: MetricsPage) -> bool:
    return page.total("baton:store_disk_writing_blocks") == 0


def _has_disk(page: MetricsPage) -> bool:
    """The new store has a worker, and blocks on disk that it did not write itself."""
    attached = page.total("baton:store_workers") and page.total("baton:worker_store_attached")
    return bool(attached and page.total("baton:store_disk_blocks") > page.total("baton:store_disk_stored_total"))


def sources(before: MetricsPage, after: MetricsPage) -> dict[str, float]:
    """Prompt tokens by where their KV came from."""
    name = "baton:prompt_tokens_total"
    earlier = before.by(name, "source")
    return {source: value - earlier.get(source, 0.0) for source, value in after.by(name, "source").items()}


def speeds(before: MetricsPage, after: MetricsPage) -> dict[str, float | None]:
    """Bytes by seconds of loads as the worker counts them, and of reads as the disk does."""
    pairs = {
        "load_gb_per_s": ("baton:worker_store_loaded_bytes_total", "baton:worker_store_actual_seconds_total"),
        "disk_gb_per_s": ("baton:store_disk_read_bytes_total", "baton:store_disk_read_seconds_total"),
    }
    found: dict[str, float | None] = {}
    for name, (done, spent) in pairs.items():
        num_bytes, seconds = (after.total(each) - before.total(each) for each in (done, spent))
        found[name] = num_bytes / seconds / 1e9 if seconds > 0 else None
    return found


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines = JsonLines(options.output)
    lines.begin(argv)
    with TemporaryDirectory(dir=options.path) as disk, served_model(options) as model:
        sizes = TierSizes(
            model.block_tokens,
            model.block_bytes,
            tuple(sorted(options.lengths, reverse=True)),
            options.repetitions,
            options.answer_tokens,
        )
        try:
            with running(settings_of(sizes, model, Path(disk), options)) as (cluster, ready_s):
                lines.put("start", ready_s=ready_s, store_gib=sizes.store_gib, pool_blocks=sizes.pool_blocks)
                TierBenchmark(cluster, sizes, lines, options).run()
        except BenchmarkFailed as error:
            lines.put("failed", error=str(error))
            return 1
    return 0


def settings_of(sizes: TierSizes, model: ServedModel, disk: Path, options: argparse.Namespace) -> ServeSettings:
    longest = sizes.lengths[0] + 1 + sizes.answer_tokens
    return ServeSettings(
        model=model.name,
        prefill=0,
        decode=1,
        device=options.device,
        gpus=(options.gpu,) if options.device == "cuda" else (),
        store_ram_gib=sizes.store_gib,
        store_disk_gib=sizes.store_gib,
        store_path=disk,
        worker_arg=(
            f"--num-blocks={sizes.pool_blocks}",
            f"--max-model-len={longest}",
            f"--store-loads={options.store_loads}",
            *model.worker_args,
            *options.worker_arg,
        ),
        start_timeout_s=options.start_timeout_s,
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("ttft-tiers", __doc__)
    add = parser.add_argument
    add("--gpu", type=int, default=0, help="the GPU")
    add("--lengths", type=int, nargs="+", help="tokens from a tier; default 2048 8192 32768, on CPU 256 1024")
    add("--repetitions", type=int, default=3, help="prompts of each length, two at least")
    add("--answer-tokens", type=int, default=128, help="of a computed prompt: its blocks are written behind meanwhile")
    add("--store-loads", default="always", choices=("always", "measured"), help="measured: where the gate lets them")
    add("--settle-s", type=float, default=0.3, help="before each request")
    add("--path", type=Path, help="folder on the disk to measure; default: that of temporary files")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--patience-s", type=float, default=30.0, help="for writes to disk, and for the store to come back")
    options = parser.parse_args(argv)
    options.lengths = options.lengths or ([256, 1024] if options.device == "cpu" else [2048, 8192, 32768])
    if options.repetitions < 2:
        parser.error("--repetitions: one prompt alone would stay in the pool")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
