"""Speed on the CPU: the whole system over HTTP against transformers.generate, in interleaved rounds of one run.

    scripts/bench cpu [--rounds 5] [--threads 2]

It prints a JSON line for each round, then a table. Only the ratios mean something on another machine. Both sides
compute the same prompts with the same model in float32; the server is started as `scripts/serve` starts it. No prompt
comes twice, so no prefix cache helps. On a machine that others use as well, look at "cores used by other programs" and
at "tokens a CPU second", which does not depend on them. It owns the plan of the rounds and the arithmetic; the clocks
are in bench_sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from baton.benchmark.harness.options import new_parser

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0

SENTENCES = """\
Once upon a time there was a little fox who lived in the forest.
The old king had three daughters, and the youngest was the bravest of them all.
It was raining, and the children stayed inside to play with their wooden blocks.
A brave little boat sailed across the big blue lake until the wind went to sleep.
Tom had a red ball. He loved to throw it high into the air.
In the middle of the night the clock struck twelve and the mouse woke up.
The cat sat on the wall and looked at the moon.
One day, a girl named Lily found a shiny stone in the garden.
There was once a poor woodcutter who lived with his wife and his seven sons.
Far away, where the river meets the sea, there stood a house with a green door.
Mia and Ben went to the park with their dog. They saw a big tree.
The baker made bread every morning, and every morning the birds came to the window.
When spring came, the snow melted and the first flowers looked out of the ground.
The little train puffed up the hill and said to itself that it would get there.
Grandmother put on her glasses, opened the big book, and began to read.
The duck had five yellow ducklings. The smallest one was always the last.""".splitlines()


class Prompts:
    """Prompts of 32 to 64 tokens that never repeat: the first block of each holds a number of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(0)
        self._given = 0

    def take(self, count: int) -> list[str]:
        return [self._one() for _ in range(count)]

    def ids(self, prompt: str) -> list[int]:
        return list(self._tokenizer.encode(prompt).ids)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _one(self) -> str:
        self._given += 1
        text = f"Story {self._given}. " + " ".join(self._random.sample(SENTENCES, 5))
        length = self._random.randint(32, 64)
        return str(self._tokenizer.decode(self._tokenizer.encode(text, add_special_tokens=False).ids[:length]))


class Side:
    """A process of bench_sides.py that answers requests, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process that is measured has ended")
        return dict(json.loads(line))


@contextmanager
def side(environment: dict[str, str], *arguments: str) -> Iterator[Side]:
    command = [sys.executable, "-P", "-m", "baton.benchmark.cluster.sides", *arguments]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Side(process)
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT_S)


@contextmanager
def server(environment: dict[str, str], model: str, port: int, more: Sequence[str]) -> Iterator[int]:
    """The process id of scripts/serve, from the moment it says `ready`."""
    command = [sys.executable, "-P", "-m", "baton.launch.serve", "--model", model, "--port", str(port)]
    command += ["--local-prefill", "short"]  # every prompt through the prefill worker, in order
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen([*command, "--device", "cpu", *more], env=environment, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while b"ready http://" not in log.read_bytes():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"scripts/serve is not ready:\n{log.read_text()}")
                time.sleep(0.2)
            yield process.pid
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def children(parent: int) -> dict[str, int]:
    """Process ids of what runs as `python -P -m baton.MODULE` under `parent`, by module; one of each is expected."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[2:3] == [b"-m"] and int(_status(int(entry.name))["PPid"]) == parent:
                found[words[3].decode().removeprefix("baton.")] = int(entry.name)
        except (OSError, ValueError):  # no process, or gone
            continue
    return found


def peak_memory_mb(pid: int) -> float:
    """VmHWM in MB of 10**6 bytes."""
    return int(_status(pid)["VmHWM"].split()[0]) * 1024 / 1e6


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time that processes have used, in user and kernel."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """CPU time of everything on this machine since it started, stolen time included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a round needs. Throughputs are tokens/s; CPU figures are CPU seconds of all processes for 1000 tokens."""

    prompts: Prompts
    client: Side
    reference: Side
    bare: Side
    """Our model's bare decode step."""
    served: tuple[int, ...]
    """Process ids of the proxy and the workers."""
    model: str
    port: int
    options: argparse.Namespace

    def round(self, number: int) -> dict[str, Any]:
        """Our side runs before and after the reference, so that a drift of the machine meets both."""
        many = self.prompts.take(self.options.concurrency)
        before = self._serve(many)
        batch = self._generate(many, batched=True)
        ones = self._generate(many[: self.options.one_by_one], batched=False)
        after = self._serve(self.prompts.take(self.options.concurrency))
        gaps_ms, steps_ms = [], []
        for text in self.prompts.take(2):
            gaps_ms += self._serve([text])["gaps_ms"]
            asked = self.bare.ask(prompt=self.prompts.ids(text), new_tokens=self.options.new_tokens)
            steps_ms += asked["steps_ms"]
        served = {name: before[name] + after[name] for name in ("tokens", "seconds", "cpu_s", "cached_tokens")}
        expected = [self.prompts.text(ids) for ids in ones["ids"]]
        return {
            "round": number,
            "served": served["tokens"] / served["seconds"],
            "static_batch": batch["tokens"] / batch["seconds"],
            "one_by_one": ones["tokens"] / ones["seconds"],
            "served_cpu": 1000 * served["cpu_s"] / served["tokens"],
            "static_batch_cpu": 1000 * batch["cpu_s"] / batch["tokens"],
            "one_by_one_cpu": 1000 * ones["cpu_s"] / ones["tokens"],
            "gap_ms": statistics.median(gaps_ms),
            "step_ms": statistics.median(steps_ms),
            "gap_mean_ms": statistics.mean(gaps_ms),
            "step_mean_ms": statistics.mean(steps_ms),
            "ttft_ms": before["ttft_ms"],
            "cached_tokens": served["cached_tokens"],
            "others_served": (before["others"] + after["others"]) / 2,
            "others_static_batch": batch["others"],
            "others_one_by_one": ones["others"],
            "equal_texts": f"{sum(map(str.__eq__, expected, before['texts']))}/{len(expected)}",
        }

    def _serve(self, texts: list[str]) -> dict[str, Any]:
        request = {"port": self.port, "model": self.model, "prompts": texts, "new_tokens": self.options.new_tokens}
        return _timed(self.served, self.client, request)

    def _generate(self, texts: list[str], *, batched: bool) -> dict[str, Any]:
        ids = [self.prompts.ids(text) for text in texts]
        request = {"prompts": ids, "new_tokens": self.options.new_tokens, "batched": batched}
        return _timed((self.reference.pid,), self.reference, request)


def _timed(pids: tuple[int, ...], side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """The side's answer, the CPU time of `pids` meanwhile, and how many cores all others used (the client is ours)."""
    ours = {*pids, side.pid}
    cpu_before, ours_before, busy_before, begin = cpu_s(pids), cpu_s(ours), busy_s(), time.perf_counter()
    answer = side.ask(**request)
    used_s, all_s, passed_s = cpu_s(ours) - ours_before, busy_s() - busy_before, time.perf_counter() - begin
    return {**answer, "cpu_s": cpu_s(pids) - cpu_before, "others": max(0.0, all_s - used_s) / passed_s}


def measure(options: argparse.Namespace, rows: list[dict[str, Any]]) -> float:
    """Fills `rows`, one a round; returns the idle proxy's peak memory in MB."""
    folder = ROOT / "models" / "demo" if options.model == "demo" else Path(options.model).resolve()
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("OMP_NUM_THREADS", None)  # scripts/serve shares the cores out itself
    port = free_port()
    with ExitStack() as stack:
        supervisor = stack.enter_context(server(environment, options.model, port, options.serve_arg))
        processes = children(supervisor)
        proxy_mb = peak_memory_mb(processes["proxy"])
        bench = Bench(
            prompts=Prompts(Tokenizer.from_file(str(folder / "tokenizer.json"))),
            client=stack.enter_context(side(environment, "load")),
            reference=stack.enter_context(side(environment, "transformers", str(folder), str(options.threads))),
            bare=stack.enter_context(side(environment, "step", str(folder), str(options.step_threads))),
            served=tuple(processes.values()),
            model=folder.name,
            port=port,
            options=options,
        )
        bench.round(-1)  # warms up
        for number in range(options.rounds):
            rows.append(bench.round(number))
            rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in rows[-1].items()}
            print(json.dumps(rounded), flush=True)
    return proxy_mb


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    rows: list[dict[str, Any]] = []
    proxy_mb = measure(options, rows)
    print(report(options, rows, proxy_mb))
    return 0


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]], proxy_mb: float) -> str:
    """Medians over the rounds; a ratio is the median of the rounds' ratios, with the least and the largest."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"

    def median(name: str) -> float:
        return statistics.median([row[name] for row in rows])

    over_one = [row["served"] / row["one_by_one"] for row in rows]
    over_batch = [row["served"] / row["static_batch"] for row in rows]
    cpu_over_batch = [row["static_batch_cpu"] / row["served_cpu"] for row in rows]
    overhead = [row["gap_ms"] - row["step_ms"] for row in rows]
    mean_overhead = [row["gap_mean_ms"] - row["step_mean_ms"] for row in rows]
    lines = [
        f"| {'measure':52} | {'value (least .. largest of the rounds)':40} | {'target':9} |",
        f"|{'-' * 54}|{'-' * 42}|{'-' * 11}|",
    ]
    for name, value, target in (
        (f"served, {options.concurrency} at once / transformers one by one", spread(over_one), ">= 4"),
        (f"served, {options.concurrency} at once / transformers' static batch", spread(over_batch), ">= 1"),
        ("serving overhead a token, 1 at once, p50, ms", spread(overhead), "< 3"),
        ("the same, of the means", spread(mean_overhead), ""),
        ("peak memory of the idle proxy, MB", f"{proxy_mb:.0f}", "< 250"),
        ("tokens a CPU second, served / static batch", spread(cpu_over_batch), ""),
        ("served, tokens/s", f"{median('served'):.0f}", ""),
        ("transformers one by one, tokens/s", f"{median('one_by_one'):.0f}", ""),
        ("transformers' static batch, tokens/s", f"{median('static_batch'):.0f}", ""),
        ("gap between streamed tokens, 1 at once, p50, ms", f"{median('gap_ms'):.2f}", ""),
        ("bare decode step, 1 row, p50, ms", f"{median('step_ms'):.2f}", ""),
        ("CPU seconds for 1000 tokens: served", f"{median('served_cpu'):.2f}", ""),
        ("... transformers' static batch", f"{median('static_batch_cpu'):.2f}", ""),
        ("... transformers one by one", f"{median('one_by_one_cpu'):.2f}", ""),
        ("cores used by other programs while served", spread([row["others_served"] for row in rows]), ""),
        ("... while the static batch ran", spread([row["others_static_batch"] for row in rows]), ""),
        (f"time to first token, {options.concurrency} at once, p50, ms", f"{median('ttft_ms'):.0f}", ""),
    ):
        lines.append(f"| {name:52} | {value:40} | {target:9} |")
    lines.append(
        f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; {len(rows)} rounds; "
        f"{options.new_tokens} tokens a request; "
        f"threads: transformers {options.threads}, bare step {options.step_threads}, workers: as scripts/serve"
    )
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("cpu", __doc__)
    parser.add_argument("--model", default="demo", help="the demo model, or a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that warms up")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once, and rows of the static batch")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--one-by-one", type=int, default=4, help="requests that transformers gets one after the other")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of transformers")
    parser.add_argument("--step-threads", type=int, default=1, help="threads of the bare step: those of a worker")
    parser.add_argument(
        "--serve-arg",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="passed on to scripts/serve; may be repeated",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
