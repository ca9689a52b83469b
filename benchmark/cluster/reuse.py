"""What the KV store saves: conversations that share system prompts, served with and without it, beside an ideal cache.

Every way of serving gets the same prompts: `off` has only the workers' pools, `ram` the store in RAM, `small` one whose
RAM cannot hold all, `disk` the same over a disk. In the middle every worker is killed. Prompt tokens by source are the
proxy's metrics; the ideal is an offline LRU over the same prompts in the same order, which forgets nothing at the
restart. Prints a JSON line a way, and a table.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from baton.benchmark.harness.options import new_parser
from baton.kvtransfer.blocks.hashing import block_hashes

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
BLOCK_TOKENS = 16
BLOCKS_A_GIB = 8192
"""Of the demo model in float32: 128 KiB a block."""
TIMEOUT_S = 300.0
SOURCES = ("gpu", "ram", "disk", "peer", "computed")


@dataclass(frozen=True, slots=True)
class Way:
    """One way of serving; `capacity_blocks` can be kept in all, pools not counted."""

    name: str
    arguments: tuple[str, ...]
    capacity_blocks: int


@dataclass(slots=True)
class Talk:
    """All conversations of one run. `log` holds what was asked and what had been said then, in the order of asking."""

    options: argparse.Namespace
    tokenizer: Tokenizer
    histories: list[str] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    prompt_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.histories = [""] * self.options.conversations

    def play(self, port: int, turns: Sequence[int]) -> None:
        """These turns of every conversation, several conversations at once."""
        for turn in turns:
            said = self._said(turn)
            with ThreadPoolExecutor(self.options.concurrency) as pool:
                list(pool.map(lambda number, said=said: self._one(port, number, said[number]), range(len(said))))

    def _said(self, turn: int) -> list[str]:
        """What the user of each conversation says; in the first turn behind one of the system prompts."""
        rng = random.Random(f"{self.options.seed}/{turn}")
        words = [word[1:] for word in self.tokenizer.get_vocab() if re.fullmatch(r"Ġ[a-z]{3,}", word)]
        words.sort()

        def text(count: int) -> str:
            return " ".join(rng.choice(words) for _ in range(count))

        shared = random.Random(self.options.seed)
        systems = [" ".join(shared.choice(words) for _ in range(self.options.system_words)) for _ in range(4)]
        openings = [f"{rng.choice(systems)}. " if turn == 0 else " " for _ in self.histories]
        return [f"{opening}{text(self.options.user_words)}." for opening in openings]

    def _one(self, port: int, number: int, said: str) -> None:
        prompt = self.histories[number] + said
        with self.lock:
            place = len(self.log)
            self.log.append((prompt, ""))
        answer = complete(port, prompt, self.options.answer_tokens)
        with self.lock:
            self.histories[number] = prompt + answer["choices"][0]["text"]
            self.log[place] = (prompt, self.histories[number])
            self.prompt_tokens += answer["usage"]["prompt_tokens"]

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
        """Of all that was said: equal whatever the cache."""
        return hashlib.sha256("\0".join(self.histories).encode()).hexdigest()[:16]


def complete(port: int, prompt: str, max_tokens: int) -> dict[str, Any]:
    """One greedy completion; a failed one ends the benchmark."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    status, answer = _http(port, "POST", "/v1/completions", json.dumps(body))
    if status != 200:
        raise SystemExit(f"HTTP {status}: {answer[:500]!r}")
    return dict(json.loads(answer))


def sources(port: int) -> dict[str, float]:
    """Prompt tokens of all workers so far, by where their KV came from."""
    _, text = _http(port, "GET", "/metrics", "")
    found = re.findall(r'^baton:prompt_tokens_total\{.*source="(\w+)".*\} (\S+)$', text.decode(), re.MULTILINE)
    return {source: float(value) for source, value in found}


def _http(port: int, method: str, path: str, body: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextmanager
def serving(port: int, arguments: Sequence[str]) -> Iterator[int]:
    """The process id of scripts/serve, from the moment it says `ready`."""
    environment = dict(os.environ)
    command = [sys.executable, "-P", "-m", "baton.launch.serve", "--port", str(port), "--device", "cpu", *arguments]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            wait_for(lambda: b"ready http://" in log.read_bytes() or process.poll() is not None, "ready")
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {TIMEOUT_S:.0f} s: {what}")
        time.sleep(0.2)


def workers_of(supervisor: int) -> list[int]:
    """Process ids of the prefill and decode workers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # no process, or gone
            continue
        if parent == supervisor and words[2:4] in ([b"-m", b"baton.prefill"], [b"-m", b"baton.decode"]):
            found.append(int(entry.name))
    return found


def kill_workers(supervisor: int, port: int) -> None:
    """SIGKILL to all of them at once, and wait until others serve in their place."""
    old = workers_of(supervisor)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(workers_of(supervisor)) - set(old)) == len(old), "new workers")

    def attached() -> bool:
        _, text = _http(port, "GET", "/metrics", "")
        ups = re.findall(r'^baton:worker_up\{.*role="(?:prefill|decode)",state="ready".*\} 1.0$', text.decode(), re.M)
        return len(ups) == len(old)

    wait_for(attached, "workers that have joined")
    time.sleep(3)  # dead ones are forgotten, new ones attached to the store


def run(way: Way, options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """Play the workload; the figures of one way."""
    talk = Talk(options, tokenizer)
    port = 20_000 + random.SystemRandom().randrange(10_000)
    pool = (f"--worker-arg=--num-blocks={options.pool_blocks}", "--prefill", "2", "--decode", "2")
    never = ("--local-prefill", "never")
    with serving(port, (*pool, *never, *way.arguments)) as supervisor:
        half, before = options.turns // 2, sources(port)
        begin = time.monotonic()
        talk.play(port, range(half))
        time.sleep(1)  # the last heartbeats
        middle = sources(port)
        if options.restart:
            kill_workers(supervisor, port)
        talk.play(port, range(half, options.turns))
        spent_s = time.monotonic() - begin
        time.sleep(1)
        after = sources(port)
    used = {source: after.get(source, 0) - before.get(source, 0) for source in SOURCES}
    late = {source: after.get(source, 0) - middle.get(source, 0) for source in SOURCES}
    return {
        "way": way.name,
        "requests": len(talk.log),
        "prompt_tokens": talk.prompt_tokens,
        **used,
        "hit_rate": 1 - used["computed"] / sum(used.values()),
        "hit_rate_after_restart": 1 - late["computed"] / sum(late.values()),
        "ideal": talk.ideal(way.capacity_blocks),
        "ideal_without_bound": talk.ideal(1 << 40),
        "seconds": spent_s,
        "said": talk.digest(),
    }


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    rows = []
    with TemporaryDirectory() as folder:
        ram, small, disk = options.ram_gib, options.small_ram_gib, options.disk_gib
        small_and_disk = ("--store-ram-gib", str(small), "--store-disk-gib", str(disk), "--store-path", folder)
        for way in (
            Way("off", ("--store-ram-gib", "0"), 2 * options.pool_blocks),
            Way("ram", ("--store-ram-gib", str(ram)), int(ram * BLOCKS_A_GIB)),
            Way("small", ("--store-ram-gib", str(small)), int(small * BLOCKS_A_GIB)),
            Way("disk", small_and_disk, int((small + disk) * BLOCKS_A_GIB)),
        ):
            if way.name in options.ways:
                rows.append(run(way, options, tokenizer))
                print(json.dumps(rows[-1]), flush=True)
    print(report(rows, options))
    return 0


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    off = next((row["computed"] for row in rows if row["way"] == "off"), 0)
    head = (*SOURCES, "computed / off", "hit rate", "after restart", "ideal LRU", "ideal, no bound", "seconds")
    lines = ["| store | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        cells = [f"{row[source]:.0f}" for source in SOURCES]
        cells.append(f"{row['computed'] / off:.2f}" if off else "")
        rates = ("hit_rate", "hit_rate_after_restart", "ideal", "ideal_without_bound")
        cells += [f"{100 * row[name]:.1f} %" for name in rates] + [f"{row['seconds']:.0f}"]
        lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    same = "equal" if len({row["said"] for row in rows}) == 1 else "DIFFERENT"
    lines.append(
        f"{options.conversations} conversations of {options.turns} turns, {options.concurrency} at once; pools of "
        f"{options.pool_blocks} blocks; answers are {same} in all ways. {platform.machine()}, {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("reuse", __doc__)
    ways = ("off", "ram", "small", "disk")
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways, help="ways of serving")
    parser.add_argument("--conversations", type=int, default=16, help="conversations")
    parser.add_argument("--turns", type=int, default=6, help="turns of each")
    parser.add_argument("--concurrency", type=int, default=4, help="conversations at once")
    parser.add_argument("--system-words", type=int, default=100, help="length of each of the four system prompts")
    parser.add_argument("--user-words", type=int, default=40, help="length of what a user says in a turn")
    parser.add_argument("--answer-tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--pool-blocks", type=int, default=128, help="blocks of each worker's pool")
    parser.add_argument("--ram-gib", type=float, default=0.25, help="RAM of the store of the way `ram`")
    parser.add_argument(
        "--small-ram-gib", type=float, default=0.03, help="RAM of the store of the ways `small` and `disk`"
    )
    parser.add_argument("--disk-gib", type=float, default=0.25, help="disk of the way `disk`")
    parser.add_argument(
        "--restart", action=argparse.BooleanOptionalAction, default=True, help="kill all workers midway"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other words")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
