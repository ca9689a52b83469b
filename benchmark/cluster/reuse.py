"""What the KV store saves: conversations that share system prompts, served with and without it, beside an ideal cache.

Every configuration gets the same prompts: `off` has only the workers' pools, `ram` the store in RAM, `small` one whose
RAM cannot hold all, `disk` the same over a disk. Midway every worker is killed. Prompt tokens by source are the proxy's
metrics; the ideal is an offline LRU over the same prompts in the same order, which forgets nothing at the restart. A
JSON line a configuration, and a table.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from baton.benchmark.cluster.completions import CompletionClient
from baton.benchmark.cluster.running import metrics, restart_all, running
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import machine_text
from baton.benchmark.harness.shapes import block_bytes
from baton.benchmark.load.table import markdown
from baton.kvtransfer.blocks.hashing import block_hashes
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings
from baton.node.modelhub import DEMO_MODEL, locate_model

BLOCK_TOKENS = 16
NUM_SYSTEM_PROMPTS = 4
GIB = 1 << 30
SOURCES = ("gpu", "ram", "disk", "peer", "computed")


@dataclass(frozen=True, slots=True)
class StoreSetup:
    """One configuration of the store, in GiB."""

    name: str
    ram_gib: float
    disk_gib: float = 0.0


@dataclass(slots=True)
class Conversations:
    """All conversations of one run. `log` has prompt and prompt with answer of each request, in order of sending."""

    options: argparse.Namespace
    tokenizer: Tokenizer
    histories: list[str] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        self.histories = [""] * self.options.conversations

    def play(self, client: CompletionClient, turns: Sequence[int]) -> None:
        """These turns of every conversation, several conversations at once."""
        for turn in turns:
            prompts = [history + text for history, text in zip(self.histories, self._user_texts(turn), strict=True)]
            answers = client.complete_all(prompts, self.options.answer_tokens, self.options.concurrency)
            self.histories = [prompt + answer.text for prompt, answer in zip(prompts, answers, strict=True)]
            self.log += zip(prompts, self.histories, strict=True)
            self.prompt_tokens += sum(answer.prompt_tokens for answer in answers)

    def _user_texts(self, turn: int) -> list[str]:
        """The next text of each conversation's user; in the first turn behind one of the system prompts."""
        rng = random.Random(f"{self.options.seed}/{turn}")
        words = sorted(word[1:] for word in self.tokenizer.get_vocab() if re.fullmatch(r"Ġ[a-z]{3,}", word))

        def text(draw: random.Random, count: int) -> str:
            return " ".join(draw.choice(words) for _ in range(count))

        shared = random.Random(self.options.seed)
        systems = [text(shared, self.options.system_words) for _ in range(NUM_SYSTEM_PROMPTS)]
        openings = [f"{rng.choice(systems)}. " if turn == 0 else " " for _ in self.histories]
        return [f"{opening}{text(rng, self.options.user_words)}." for opening in openings]

    def ideal(self, capacity_blocks: int) -> float:
        """Part of the prompt tokens that an LRU cache of so many blocks has, over the same prompts in their order."""
        cache: OrderedDict[bytes, None] = OrderedDict()
        hits = total = 0
        for prompt, after in self.log:
            ids = self.tokenizer.encode(prompt).ids
            hashes = block_hashes(bytes(32), ids[:-1], BLOCK_TOKENS)
            found = next((n for n, each in enumerate(hashes) if each not in cache), len(hashes))
            hits, total = hits + found * BLOCK_TOKENS, total + len(ids)
            for each in reversed(block_hashes(bytes(32), self.tokenizer.encode(after).ids[:-1], BLOCK_TOKENS)):
                cache[each] = None
                cache.move_to_end(each)
            while len(cache) > capacity_blocks:
                cache.popitem(last=False)
        return hits / total

    def digest(self) -> str:
        """Of all texts: equal whatever the cache."""
        return hashlib.sha256("\0".join(self.histories).encode()).hexdigest()[:16]


def sources(cluster: Cluster) -> dict[str, float]:
    """Prompt tokens of all workers so far, by the source of their KV."""
    return metrics(cluster).by("baton:prompt_tokens_total", "source")


def run(setup: StoreSetup, disk: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Play the workload; the figures of one configuration. `folder` is the model's."""
    conversations = Conversations(options, Tokenizer.from_file(str(folder / "tokenizer.json")))
    settings = ServeSettings(
        model=DEMO_MODEL,
        prefill=2,
        decode=2,
        device="cpu",
        local_prefill="never",
        store_ram_gib=setup.ram_gib,
        store_disk_gib=setup.disk_gib,
        store_path=disk,
        worker_arg=(f"--num-blocks={options.pool_blocks}",),
    )
    with running(settings) as (cluster, _):
        client = CompletionClient(cluster.url, cluster.model)
        half, before = options.turns // 2, sources(cluster)
        begin = time.monotonic()
        conversations.play(client, range(half))
        middle = sources(cluster)
        if options.restart:
            restart_all(cluster, [name for name in cluster.running() if name.startswith(("prefill-", "decode-"))])
        conversations.play(client, range(half, options.turns))
        spent_s = time.monotonic() - begin
        after = sources(cluster)
    used = {source: after.get(source, 0) - before.get(source, 0) for source in SOURCES}
    late = {source: after.get(source, 0) - middle.get(source, 0) for source in SOURCES}
    capacity = (setup.ram_gib + setup.disk_gib) * GIB / block_bytes(folder, BLOCK_TOKENS, dtype_bytes=4)
    return {
        "way": setup.name,
        "requests": len(conversations.log),
        "prompt_tokens": conversations.prompt_tokens,
        **used,
        "hit_rate": 1 - used["computed"] / sum(used.values()),
        "hit_rate_after_restart": 1 - late["computed"] / sum(late.values()),
        "ideal": conversations.ideal(int(capacity) or 2 * options.pool_blocks),
        "ideal_without_bound": conversations.ideal(1 << 40),
        "seconds": spent_s,
        "said": conversations.digest(),
    }


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines, rows = JsonLines(options.output), []
    for setup in (
        StoreSetup("off", 0.0),
        StoreSetup("ram", options.ram_gib),
        StoreSetup("small", options.small_ram_gib),
        StoreSetup("disk", options.small_ram_gib, options.disk_gib),
    ):
        if setup.name in options.ways:
            with TemporaryDirectory() as disk:
                rows.append(run(setup, Path(disk), options, locate_model(DEMO_MODEL)))
            lines.write(**rows[-1])
    print(report(rows, options))
    return 0


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    off = next((row["computed"] for row in rows if row["way"] == "off"), 0)
    head = (*SOURCES, "computed / off", "hit rate", "after restart", "ideal LRU", "ideal, no bound", "seconds")
    rates = ("hit_rate", "hit_rate_after_restart", "ideal", "ideal_without_bound")
    table = [
        [
            str(row["way"]),
            *(f"{row[source]:.0f}" for source in SOURCES),
            f"{row['computed'] / off:.2f}" if off else "",
            *(f"{100 * row[name]:.1f} %" for name in rates),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    same = "equal" if len({row["said"] for row in rows}) == 1 else "DIFFERENT"
    return (
        f"{markdown(('store', *head), table)}\n"
        f"{options.conversations} conversations of {options.turns} turns, {options.concurrency} at once; pools of "
        f"{options.pool_blocks} blocks; answers are {same} in all configurations. {machine_text()}"
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("reuse", __doc__)
    ways = ("off", "ram", "small", "disk")
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways, help="configurations of the store")
    parser.add_argument("--conversations", type=int, default=16, help="conversations")
    parser.add_argument("--turns", type=int, default=6, help="turns of each")
    parser.add_argument("--concurrency", type=int, default=4, help="conversations at once")
    parser.add_argument("--system-words", type=int, default=100, help="length of each of the four system prompts")
    parser.add_argument("--user-words", type=int, default=40, help="length of a user's text in a turn")
    parser.add_argument("--answer-tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--pool-blocks", type=int, default=128, help="blocks of each worker's pool")
    parser.add_argument("--ram-gib", type=float, default=0.25, help="RAM of the store in `ram`")
    parser.add_argument("--small-ram-gib", type=float, default=0.03, help="RAM of the store in `small` and `disk`")
    parser.add_argument("--disk-gib", type=float, default=0.25, help="disk of the store in `disk`")
    parser.add_argument(
        "--restart", action=argparse.BooleanOptionalAction, default=True, help="kill all workers midway"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the words")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
